"""Signals to a run of one process or several: the step is finished and saved, and the run goes on from there."""

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

# Steps enough to be stopped amid them, and an epoch that ends.
FIT = (
    "fit", "--config", "vit.yaml", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2",
    "--trainer.limit_train_batches", "{steps}", "--trainer.limit_val_batches", "1", "--data.batch_size", "4",
    "--model.adapter.rank", "2", "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1",
)  # fmt: skip
RUN = Path("runs/version_0")
ONE = (sys.executable, "-m", "snell_lightning")
TWO = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "snell_lightning")


def start(
    folder: Path,
    *options: str,
    steps: int,
    program: tuple[str, ...] = ONE,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    command = [*program, *(part.format(steps=steps) for part in FIT), *options]
    with (folder / "printed.txt").open("a") as printed:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=printed,
            stderr=subprocess.STDOUT,
        )


def wait_for_steps(process: subprocess.Popen, folder: Path) -> None:
    """Wait until another hundred steps were made, by all processes: then their rows are written."""
    before = rows_written(folder)
    deadline = time.monotonic() + 60
    while rows_written(folder) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def rows_written(folder: Path) -> int:
    metrics = folder / RUN / "metrics.csv"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def finish(process: subprocess.Popen, folder: Path) -> tuple[int, str]:
    process.wait(timeout=120)
    return process.returncode, (folder / "printed.txt").read_text()


def steps_done(folder: Path) -> int:
    return torch.load(folder / RUN / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_d8_a_stopped_run_is_saved_and_goes_on(signum: int, status: int, tmp_path: Path) -> None:
    process = start(tmp_path, steps=5000)
    wait_for_steps(process, tmp_path)
    process.send_signal(signum)
    code, printed = finish(process, tmp_path)
    assert code == status, printed
    assert f"stopped by {signal.Signals(signum).name}; to go on: --resume runs/version_0" in printed
    assert "Traceback" not in printed
    stopped = steps_done(tmp_path)
    assert 0 < stopped < 5000
    if signum == signal.SIGINT:
        return

    code, printed = finish(start(tmp_path, "--resume", "auto", steps=stopped + 2), tmp_path)
    assert code == 0, printed
    assert steps_done(tmp_path) == 2 * (stopped + 2)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]


def test_d4_d8_two_processes_of_torchrun_train_together_and_stop_at_the_same_step(tmp_path: Path) -> None:
    process = start(tmp_path, steps=5000, program=TWO)
    wait_for_steps(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    code, printed = finish(process, tmp_path)
    # torchrun has a status of its own.
    assert code != 0, printed
    assert "torchrun started 2 processes on one machine: trainer.devices 2, trainer.strategy ddp" in printed
    assert printed.count("stopped by SIGTERM; to go on: --resume runs/version_0") == 1, printed
    assert 0 < steps_done(tmp_path) < 5000
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]


def test_what_two_processes_began_one_goes_on_with_at_the_same_image(tmp_path: Path) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    whole.mkdir()
    moved.mkdir()
    # The second --data.batch_size counts.
    alone = ("--data.batch_size", "8")
    code, printed = finish(start(whole, *alone, steps=12), whole)
    assert code == 0, printed

    process = start(moved, "--checkpoint.every_n_train_steps", "1", steps=12, program=TWO)
    last = moved / RUN / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 60
    while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finish(process, moved)
    stopped = steps_done(moved)
    assert 0 < stopped < 24
    code, printed = finish(start(moved, *alone, "--resume", "auto", steps=12), moved)
    assert code == 0, printed

    # The losses of the steps that follow are those of one process from the beginning: of the same images, and of
    # weights that two processes have trained on the same images before. Later on, rounding has its say.
    expected, found = losses(whole), losses(moved)
    assert found.keys() == expected.keys() == set(range(24))
    for step in range(stopped, min(stopped + 4, 24)):
        assert found[step] == pytest.approx(expected[step], rel=0.03), step


def losses(folder: Path) -> dict[int, float]:
    with (folder / RUN / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def test_d5_a_slurm_job_of_two_tasks_is_queued_again_and_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)

    def tasks(count: int, *options: str, steps: int, **more: str) -> list[subprocess.Popen]:
        slurm = {"SLURM_NTASKS": str(count), "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
        slurm |= {"SLURM_JOB_NAME": "fit", "SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}", **more}
        places = ({"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(count))
        return [start(tmp_path, *options, steps=steps, environment={**slurm, **place}) for place in places]

    started = tasks(2, steps=5000)
    wait_for_steps(started[0], tmp_path)
    for task in started:
        task.send_signal(signal.SIGUSR1)
    assert [finish(task, tmp_path)[0] for task in started] == [138, 138], (tmp_path / "printed.txt").read_text()
    printed = (tmp_path / "printed.txt").read_text()
    assert "stopped by SIGUSR1; to go on: --resume runs/version_0" in printed
    assert "SLURM job 7 is queued again" in printed
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert {path.parent.relative_to(tmp_path) for path in tmp_path.rglob("*.ckpt")} == {RUN / "checkpoints"}
    stopped = steps_done(tmp_path)

    # Another job, and the first one again, which is known by its number and its command.
    (other,) = tasks(1, steps=2, SLURM_JOB_ID="8", SLURM_RESTART_COUNT="1")
    code, printed = finish(other, tmp_path)
    assert code == 0, printed
    assert (tmp_path / "runs/version_1/adapter.safetensors").is_file()
    assert steps_done(tmp_path) == stopped
    again = tasks(2, steps=5000, SLURM_RESTART_COUNT="1")
    wait_for_steps(again[0], tmp_path)
    for task in again:
        task.send_signal(signal.SIGTERM)
    assert [finish(task, tmp_path)[0] for task in again] == [143, 143]
    printed = (tmp_path / "printed.txt").read_text()
    assert "resume: the run in runs/version_0 goes on from runs/version_0/checkpoints/last.ckpt" in printed
    assert steps_done(tmp_path) > stopped
