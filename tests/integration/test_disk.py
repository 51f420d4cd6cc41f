"""A disk that is full, read-only or gone ends a run with one line, and what had been saved is there and whole."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snell_lightning.callbacks import AdapterCheckpoint
from snell_lightning.checkpoints import read_checkpoint

from .conftest import QUICK, Command

LAST = Path("runs/version_0/checkpoints/last.ckpt")
EACH_STEP = ("fit", *QUICK, "--trainer.max_epochs", "3", "--checkpoint.every_n_train_steps", "1")
GO_ON = "last.ckpt is whole: once that is mended, go on with --resume runs/version_0"

# A disk of its own is made by mounting one in memory.
mounts = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None, reason="only root may mount a disk"
)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder: a disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=True)
    monkeypatch.chdir(folder)
    yield folder
    monkeypatch.undo()
    while subprocess.run(["umount", "-l", folder / "runs"], check=False, capture_output=True).returncode == 0:
        pass
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def after_three_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Have something happen when the third step has been saved."""

    def arrange(happen: Callable[[], Any]) -> None:
        save = AdapterCheckpoint._save_last

        def save_last(self: AdapterCheckpoint, trainer: Any) -> None:
            save(self, trainer)
            if trainer.global_step == 3:
                happen()

        monkeypatch.setattr(AdapterCheckpoint, "_save_last", save_last)

    return arrange


def fill() -> None:
    with contextlib.suppress(OSError), Path("ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(".").free == 0


def make_read_only() -> None:
    subprocess.run(["mount", "--bind", "runs", "runs"], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", "runs"], check=True)


@mounts
def test_a_full_disk_ends_the_run_which_goes_on_when_there_is_space(
    disk: Path, command: Command, after_three_steps: Callable[..., None]
) -> None:
    after_three_steps(fill)
    ended = command(*EACH_STEP)
    assert ended.status == 1
    assert len(ended.errors) == 1
    assert "No space left on device" in ended.errors[0]
    assert GO_ON in ended.errors[0]
    assert "Traceback" not in ended.err
    assert read_checkpoint(LAST)["global_step"] == 3
    assert not list(Path("runs").rglob(".*.part"))
    Path("ballast").unlink()
    after_three_steps(lambda: None)
    assert command(*EACH_STEP, "--resume", "auto").errors == []
    assert read_checkpoint(LAST)["global_step"] == 6


@mounts
def test_a_disk_that_becomes_read_only_ends_the_run(
    disk: Path, command: Command, after_three_steps: Callable[..., None]
) -> None:
    after_three_steps(make_read_only)
    ended = command(*EACH_STEP)
    assert (ended.status, len(ended.errors)) == (1, 1)
    assert "Read-only file system" in ended.errors[0]
    assert GO_ON in ended.errors[0]
    assert "Traceback" not in ended.err
    assert read_checkpoint(LAST)["global_step"] == 3


@mounts
def test_no_run_starts_where_nothing_can_be_written(disk: Path, command: Command) -> None:
    Path("runs").mkdir()
    make_read_only()
    ended = command(*EACH_STEP)
    assert (ended.status, len(ended.errors)) == (1, 1)
    assert "Read-only file system" in ended.errors[0]
    assert "version_0" in ended.errors[0]


def test_a_folder_that_is_removed_ends_the_run_and_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command, after_three_steps: Callable[..., None]
) -> None:
    monkeypatch.chdir(tmp_path)
    after_three_steps(lambda: shutil.rmtree("runs/version_0"))
    ended = command(*EACH_STEP)
    assert (ended.status, len(ended.errors)) == (1, 1)
    assert "the run's folder" in ended.errors[0]
    assert "is not there any more" in ended.errors[0]
    assert "Traceback" not in ended.err
    assert list(Path("runs").iterdir()) == []
