"""A run that is killed and resumed ends where an uninterrupted one ends, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from .conftest import QUICK, Command

# Everything that draws random numbers is on: shuffling, augmentation, mixing, dropout and drop path of the update.
COMMON = [
    "fit", "--config", "vit.yaml", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "3",
    "--trainer.limit_train_batches", "5", "--trainer.limit_val_batches", "2", "--data.batch_size", "8",
    "--model.mixup", "0.2", "--model.cutmix", "1.0",
    "--model.adapter.dropout", "0.1", "--model.adapter.drop_path", "0.1",
    "--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false",
]  # fmt: skip


def start(folder: Path, *options: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "snell_lightning",
        *COMMON,
        "--trainer.logger.save_dir",
        str(folder),
        *options,
    ]
    return subprocess.Popen(command, cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


def last(folder: Path, version: int = 0) -> Path:
    return folder / f"version_{version}" / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(("workers", "own_folder"), [("0", False), ("2", True)])
def test_killed_after_an_epoch_and_resumed_the_parameters_are_those_of_the_uninterrupted_run(
    tmp_path: Path, workers: str, own_folder: bool
) -> None:
    options = ("--data.num_workers", workers)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole, *options))

    process = start(killed, *options)
    deadline = time.monotonic() + 120
    while not last(killed).is_file() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    stopped = torch.load(last(killed), weights_only=True)
    assert stopped["global_step"] < 15

    # The workers of the killed process may live for a moment yet.
    finish(start(killed, *options, *(("--resume", "auto") if own_folder else ("--ckpt_path", str(last(killed))))))
    end = last(killed, version=0 if own_folder else 1)
    expected, resumed = (torch.load(path, weights_only=True) for path in (last(whole), end))
    assert resumed["global_step"] == expected["global_step"] == 15
    assert resumed["state_dict"].keys() == expected["state_dict"].keys()
    for name, tensor in expected["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], tensor), name
    moments, other = (each["optimizer_states"][0]["state"] for each in (expected, resumed))
    for index, state in moments.items():
        assert torch.equal(state["exp_avg_sq"], other[index]["exp_avg_sq"]), index


def test_explicit_values_beat_those_of_the_checkpoint(tmp_path: Path) -> None:
    finish(start(tmp_path / "run", "--trainer.max_epochs", "1", "--model.optimizer.weight_decay", "0.03"))
    changed = ["--model.optimizer.lr", "2e-4", "--model.optimizer.weight_decay", "0.2", "--model.mixup", "0"]
    finish(
        start(
            tmp_path / "run",
            "--trainer.max_epochs",
            "2",
            *changed,
            "--ckpt_path",
            str(last(tmp_path / "run")),
        )
    )

    resumed = torch.load(last(tmp_path / "run", version=1), weights_only=True)
    group = resumed["optimizer_states"][0]["param_groups"][1]
    assert group["initial_lr"] == 2e-4
    assert group["lr"] < 2e-4
    assert group["weight_decay"] == 0.2
    assert resumed["hyper_parameters"]["mixup"] == 0
    # What is not given again is the checkpoint's.
    assert resumed["hyper_parameters"]["cutmix"] == 1.0
    assert resumed["global_step"] == 10


def test_steps_of_another_size_are_told_of(work: Path, command: Command, caplog: pytest.LogCaptureFixture) -> None:
    last = "runs/version_0/checkpoints/last.ckpt"
    more = ("fit", *QUICK, "--ckpt_path", last, "--trainer.max_epochs", "3")
    assert command(*more, "--trainer.accumulate_grad_batches", "2").status == 0
    assert "resume: a step has 16 images, and had 8 before" in caplog.text
    caplog.clear()
    assert command(*more).status == 0
    assert "resume: a step" not in caplog.text
