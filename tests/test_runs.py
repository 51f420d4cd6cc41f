"""Run folders: nobody gets another one's."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snell_lightning import UserError
from snell_lightning.logger import RunLogger
from snell_lightning.runs import claim, own_adapter


def test_b2_folders_claimed_at_once_are_all_different(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        numbers = list(pool.map(lambda _: claim(tmp_path / "runs", 0), range(64)))
    assert sorted(numbers) == list(range(64))
    assert len(list((tmp_path / "runs").iterdir())) == 64


def test_b2_the_logger_takes_its_folder_when_it_is_first_asked_where_it_is(tmp_path: Path) -> None:
    first, second = RunLogger(str(tmp_path)), RunLogger(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert (second.version, first.version) == (0, 1)
    assert first.log_dir == str(tmp_path / "version_1")
    assert RunLogger(str(tmp_path), version="mine").log_dir == str(tmp_path / "mine")


def test_b2_other_processes_of_a_run_make_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1, raising=False)
    assert RunLogger(str(tmp_path)).version == 0
    assert list(tmp_path.iterdir()) == []


def test_a2_a_config_stands_for_a_run_if_a_run_saved_it(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: {}\n")
    assert own_adapter(str(config)) is None
    (tmp_path / "adapter.safetensors").touch()
    assert own_adapter(str(config)) == str(tmp_path / "adapter.safetensors")
    other = tmp_path / "job.yaml"
    other.write_text("model: {}\n")
    assert own_adapter(str(other)) is None
    (tmp_path / "adapter.safetensors").unlink()
    config.write_text("# lightning.pytorch==2.6.6\nmodel: {}\n")
    with pytest.raises(UserError, match=r"has no adapter.safetensors; name what .* with --model.adapter_file"):
        own_adapter(str(config))
