"""Signals to a run of one process or several: the step is finished and saved, and the run goes on from there."""

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
    with (folder / "printed.txt").open("w") as printed:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=printed,
            stderr=subprocess.STDOUT,
        )


def wait_for_steps(process: subprocess.Popen, folder: Path) -> None:
    """Wait until training has begun: TensorBoard's file is there, and a moment has passed."""
    deadline = time.monotonic() + 60
    while not list((folder / RUN).glob("events*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)


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
    assert code != 0
    assert "torchrun started 2 processes on one machine: trainer.devices 2, trainer.strategy ddp" in printed
    assert printed.count("stopped by SIGTERM; to go on: --resume runs/version_0") == 1
    stopped = steps_done(tmp_path)
    assert 0 < stopped < 5000

    code, printed = finish(start(tmp_path, "--resume", "auto", steps=stopped + 2, program=TWO), tmp_path)
    assert code == 0, printed
    assert steps_done(tmp_path) == 2 * (stopped + 2)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]


def test_d5_a_slurm_job_that_is_queued_again_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    slurm = {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    slurm |= {"SLURM_JOB_NAME": "fit", "SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    process = start(tmp_path, steps=5000, environment=slurm)
    wait_for_steps(process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    code, printed = finish(process, tmp_path)
    assert code == 143, printed
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert {path.parent.relative_to(tmp_path) for path in tmp_path.rglob("*.ckpt")} == {RUN, RUN / "checkpoints"}
    stopped = steps_done(tmp_path)

    # Another job, and the first one again, which is known by its number and its command.
    other = start(tmp_path, steps=2, environment={**slurm, "SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"})
    code, printed = finish(other, tmp_path)
    assert code == 0, printed
    assert (tmp_path / "runs/version_1/adapter.safetensors").is_file()
    assert steps_done(tmp_path) == stopped
    again = start(tmp_path, steps=5000, environment={**slurm, "SLURM_RESTART_COUNT": "1"})
    deadline = time.monotonic() + 60
    while "Restored all states" not in (tmp_path / "printed.txt").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    again.send_signal(signal.SIGTERM)
    code, printed = finish(again, tmp_path)
    assert "resume: the run in runs/version_0 goes on from runs/version_0/checkpoints/last.ckpt" in printed
    assert steps_done(tmp_path) > stopped
