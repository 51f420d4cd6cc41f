"""Run folders: nobody gets another one's."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snell_lightning import UserError
from snell_lightning.logger import RunLogger
from snell_lightning.runs import Run, claim, continuable, own_adapter, root_of, unfinished
from snell_lightning.trainer import SnellTrainer


def test_b2_folders_claimed_at_once_are_all_different(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: claim(tmp_path / "runs", "version_*"), range(64)))
    assert sorted(folders) == sorted(tmp_path / "runs" / f"version_{number}" for number in range(64))


def test_d9_a_fixed_name_gets_a_number_where_it_is_taken(tmp_path: Path) -> None:
    assert [claim(tmp_path, "mine").name for _ in range(3)] == ["mine", "mine_1", "mine_2"]


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


@pytest.mark.parametrize(
    ("settings", "root"),
    [
        ({}, "runs"),
        ({"logger": False}, "runs"),
        ({"logger": {"init_args": {"save_dir": "here"}}}, "here"),
        ({"logger": {"class_path": "snell_lightning.logger.RunLogger", "init_args": {"name": "a"}}}, "runs/a"),
        ({"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}}, "runs"),
        ({"default_root_dir": "root", "logger": {"init_args": {"save_dir": "here"}}}, "root"),
    ],
)
def test_d10_where_runs_go(settings: dict, root: str) -> None:
    assert root_of(settings) == Path(root).absolute()


def checkpoint(folder: Path, name: str, age: int) -> Path:
    """A file of that name, so many seconds old."""
    path = folder / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    return path


def started(root: Path, **facts: str) -> Run:
    run = Run(root, "version_*", facts)
    run.start(can_be_continued=True)
    return run


def test_resumed_is_the_newest_whole_checkpoint_of_the_runs_that_did_not_finish(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    first, second, finished = (started(root) for _ in range(3))
    assert first.folder
    assert second.folder
    assert finished.folder
    checkpoint(first.folder, "last.ckpt", 30)
    older, broken = checkpoint(second.folder, "epoch=1.ckpt", 20), checkpoint(second.folder, "last.ckpt", 10)
    checkpoint(finished.folder, "last.ckpt", 0)
    finished.finish()
    first.release()
    second.release()
    assert unfinished(root, lambda path: True) == (second.folder, broken)
    assert unfinished(root, lambda path: path != broken) == (second.folder, older)
    assert continuable(second.folder, lambda path: path != broken) == older
    assert unfinished(root, lambda path: False) is None
    with pytest.raises(UserError, match="no unfinished run in"):
        continuable(finished.folder, lambda path: True)
    with pytest.raises(UserError, match="no whole checkpoint"):
        continuable(first.folder, lambda path: False)


def test_a_run_is_known_by_what_it_was_started_with(tmp_path: Path) -> None:
    mine, other = started(tmp_path, slurm_job="1"), started(tmp_path, slurm_job="2")
    assert mine.folder
    assert other.folder
    path = checkpoint(mine.folder, "last.ckpt", 9)
    checkpoint(other.folder, "last.ckpt", 0)
    mine.release()
    other.release()
    assert unfinished(tmp_path, lambda path: True, slurm_job="1") == (mine.folder, path)
    assert unfinished(tmp_path, lambda path: True, slurm_job="3") is None


def test_d3_checkpoints_of_a_run_that_was_moved_are_found(tmp_path: Path) -> None:
    run = started(tmp_path / "runs")
    assert run.folder
    checkpoint(run.folder, "last.ckpt", 0)
    run.release()
    (tmp_path / "runs").rename(tmp_path / "moved")
    folder = tmp_path / "moved" / "version_0"
    assert unfinished(tmp_path / "moved", lambda path: True) == (folder, folder / "checkpoints" / "last.ckpt")


def test_a_run_that_is_going_on_in_another_process_is_left_alone(tmp_path: Path) -> None:
    code = f"""
import sys; from pathlib import Path; from snell_lightning.runs import Run
run = Run(Path({str(tmp_path)!r}), "version_*"); run.start(True); print(run.folder, flush=True); sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    folder = Path(process.stdout.readline().strip())
    checkpoint(folder, "last.ckpt", 0)
    assert unfinished(tmp_path, lambda path: True) is None
    with pytest.raises(UserError, match="still going on"):
        continuable(folder, lambda path: True)
    with pytest.raises(UserError, match="going on already"):
        Run(tmp_path, "", folder=folder).start(can_be_continued=True)
    process.kill()
    process.communicate()
    # Nobody tidied up after it.
    assert unfinished(tmp_path, lambda path: True) == (folder, folder / "checkpoints" / "last.ckpt")


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


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    trainer = SnellTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.prepare(Run(tmp_path, "run"))
    signals = trainer._signal_connector
    signals._stop(signal.SIGTERM, None)
    assert trainer.received_sigterm
    assert trainer.stopped_by == signal.SIGTERM
    with pytest.raises(KeyboardInterrupt):
        signals._stop(signal.SIGINT, None)
