"""Two processes over gloo against one, with the same global batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Adam divides a gradient by its own size, so what rounding does to a tiny one grows to a share of the learning rate.
# The paper's rate keeps that below the tolerance.
COMMON = [
    "--config", "vit.yaml", "--trainer.accelerator", "cpu", "--data.augmentation", "none", "--trainer.max_steps", "5",
    "--model.optimizer.lr", "1e-3",
    "--trainer.limit_val_batches", "4", "--data.eval_batch_size", "45", "--trainer.log_every_n_steps", "2",
    "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip


def fit(folder: Path, *options: str) -> dict:
    """Fit in processes of their own and return the last checkpoint."""
    command = [
        sys.executable,
        "-m",
        "snell_lightning",
        "fit",
        *COMMON,
        "--trainer.logger.save_dir",
        str(folder),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, Path]:
    folder = tmp_path_factory.mktemp("ddp")
    one = fit(folder / "one", "--data.batch_size", "16")
    two = fit(folder / "two", "--data.batch_size", "8", "--config", "trainer/ddp.yaml", "--trainer.devices", "2")
    return one, two, folder


def test_two_processes_and_one_give_the_same_parameters_after_five_steps(
    one_and_two: tuple[dict, dict, Path],
) -> None:
    one, two, _ = one_and_two
    assert one["global_step"] == two["global_step"] == 5
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for name, tensor in one["state_dict"].items():
        torch.testing.assert_close(
            two["state_dict"][name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    moments = [state["exp_avg"].abs().max() for state in two["optimizer_states"][0]["state"].values()]
    assert min(moments) > 0, "something was not trained"


def test_validation_over_two_processes_gives_the_score_of_one(one_and_two: tuple[dict, dict, Path]) -> None:
    # 270 images at 50 a batch: the last batch is short on one process, and the shards end unevenly on two.
    folder = one_and_two[2]
    checkpoint = folder / "one" / "version_0" / "checkpoints" / "last.ckpt"
    scores = {}
    for run, options in {
        "one": (),
        "two": ("--config", "trainer/ddp.yaml", "--trainer.devices", "2"),
    }.items():
        command = [
            sys.executable, "-m", "snell_lightning", "validate", "--config", "vit.yaml", "--trainer.accelerator", "cpu",
            "--data.eval_batch_size", "50", "--ckpt_path", str(checkpoint), "--trainer.enable_progress_bar", "false",
            "--trainer.logger.save_dir", str(folder / f"validate-{run}"), *options,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
        (line,) = (line for line in done.stdout.splitlines() if "val/acc1" in line)
        scores[run] = float(line.replace("│", " ").split()[-1])
    assert scores["one"] == scores["two"]
    assert scores["one"] * 270 == pytest.approx(round(scores["one"] * 270), abs=1e-3)
