"""Whole commands, run in this process in a working folder of their own."""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from snell_lightning.cli import main

# The embedded backbone with a small adapter and a handful of batches.
QUICK = (
    "--config", "vit.yaml", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2",
    "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1",
    "--data.batch_size", "8", "--data.eval_batch_size", "64", "--model.adapter.rank", "2",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that tell a user about a mistake."""
        return [line for line in self.err.splitlines() if line.startswith("error")]


@dataclass(frozen=True)
class Trained:
    """A working folder with a finished run of two epochs in `runs/version_0`, and what that run printed."""

    folder: Path
    out: str


Command = Callable[..., Outcome]


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One run that many tests look at; they work on copies of its folder."""
    folder = tmp_path_factory.mktemp("trained")
    here, arguments, printed = Path.cwd(), sys.argv, io.StringIO()
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(printed):
            main(["fit", *QUICK])
    finally:
        os.chdir(here)
        sys.argv = arguments
    return Trained(folder, printed.getvalue())


@pytest.fixture
def work(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder during a test: a copy of the finished run's."""
    folder = tmp_path / "work"
    shutil.copytree(trained.folder, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """A function that runs a command line and gives its outcome."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["snell_lightning"])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        status = 0
        try:
            main(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    return run
