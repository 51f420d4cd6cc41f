"""A run that is stopped and resumed, whenever that is, ends where an uninterrupted one ends, bit for bit."""

import csv
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.exceptions import SIGTERMException

from snell_lightning.callbacks import AdapterCheckpoint
from snell_lightning.checkpoints import read_checkpoint
from snell_lightning.data.dataset import ImageDataset

from .conftest import QUICK, Command

# Everything that draws random numbers is on: shuffling, augmentation, mixing, dropout and drop path of the update.
FIT = (
    "fit", *QUICK, "--trainer.limit_train_batches", "7", "--model.mixup", "0.2", "--model.cutmix", "1.0",
    "--model.adapter.dropout", "0.1", "--model.adapter.drop_path", "0.1", "--checkpoint.save_top_k", "-1",
)  # fmt: skip
WAITING = ("--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "3")
LAST = "checkpoints/last.ckpt"


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of each `last.ckpt` that is written."""
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    save = AdapterCheckpoint._save_last

    def save_last(self: AdapterCheckpoint, trainer: Any) -> None:
        save(self, trainer)
        shutil.copyfile(self.last_model_path, folder / f"step={trainer.global_step}.ckpt")

    monkeypatch.setattr(AdapterCheckpoint, "_save_last", save_last)
    return folder


def contents(run: Path) -> dict[str, Any]:
    """What a run has come to: all of its last checkpoint but what names files."""
    saved = read_checkpoint(run / LAST)
    return {key: value for key, value in saved.items() if key not in ("callbacks", "hparams_name", "logged_rows")}


def assert_equal(one: Any, other: Any, place: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key, value in one.items():
            assert_equal(value, other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for number, value in enumerate(one):
            assert_equal(value, other[number], f"{place}[{number}]")
    else:
        assert one == other, place


def logged(run: Path) -> list[dict[str, str]]:
    """The rows that a run has logged, but for times and memory, and what is empty."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [
            {k: v for k, v in row.items() if v and not k.startswith(("memory/", "throughput/"))}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row.keys() - {"step", "epoch"}]


@pytest.mark.parametrize(
    "options",
    [
        ("--checkpoint.every_n_train_steps", "3", "--data.num_workers", "2"),
        # Saved while gradients wait for more, and by validations in the middle of an epoch, at whose end there is none.
        (*WAITING, "--trainer.max_epochs", "-1", "--trainer.max_steps", "8"),
        # SNELLA: what a layer's share follows from, and the shares.
        (
            "--checkpoint.every_n_train_steps", "3", "--model.adapter.kernel", "mixture",
            "--model.adapter.sparsity", "0.1", "--model.adapter.sparsifier", "magnitude",
            "--trainer.callbacks+=snell_lightning.callbacks.LayerBudget",
            "--trainer.callbacks.target_sparsity", "0.7", "--trainer.callbacks+=snell_lightning.callbacks.AdapterEMA",
            "--trainer.callbacks.decay", "0.7",
        ),
    ],
)  # fmt: skip
def test_every_checkpoint_leads_to_the_same_end(options: tuple[str, ...], kept: Path, command: Command) -> None:
    assert command(*FIT, *options).status == 0
    whole = Path("runs/version_0")
    expected, rows = contents(whole), logged(whole)
    saved = [*kept.iterdir(), *(whole / "checkpoints").glob("epoch=*.ckpt")]
    within = [path for path in saved if read_checkpoint(path)["global_step"] < expected["global_step"]]
    assert len(within) >= 2
    for number, path in enumerate(within, 1):
        resumed = Path(f"runs/version_{number}")
        # Workers or none: what is drawn for an image is the same.
        assert command(*FIT, *options, "--ckpt_path", str(path), "--data.num_workers", "0").status == 0
        assert_equal(expected, contents(resumed), path.name)
        assert logged(resumed) == rows[-len(logged(resumed)) :], path.name


@pytest.mark.parametrize(("batches", "alone"), [(3, True), (7, True), (3, False), (7, False)])
def test_stopped_by_a_signal_it_ends_there_too(
    batches: int, alone: bool, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Gradients wait after 3 batches, an epoch ends after 7.
    monkeypatch.chdir(tmp_path)
    fit = (*FIT, *WAITING, "--checkpoint.every_n_epochs", "9", "--trainer.logger.save_dir")
    assert command(*fit, "whole").status == 0
    advance, trained = _TrainingEpochLoop.advance, [0]

    def stopped(self: _TrainingEpochLoop, fetcher: Any) -> None:
        if trained[0] == batches:
            self.trainer._signal_connector._stop(signal.SIGTERM, None)
            if not alone:
                # Several processes agree to stop when a batch is about to begin, which may be that of a new epoch.
                raise SIGTERMException
        trained[0] += 1
        advance(self, fetcher)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", stopped)
    assert command(*fit, "runs").status == 143
    monkeypatch.setattr(_TrainingEpochLoop, "advance", advance)
    assert command(*fit, "runs", "--resume", "auto").status == 0
    whole, resumed = Path("whole/version_0"), Path("runs/version_0")
    assert_equal(contents(whole), contents(resumed))
    assert logged(resumed) == logged(whole)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the training images that are opened, in order."""
    numbers: list[int] = []
    get = ImageDataset.__getitem__

    def noted(self: ImageDataset, number: int) -> Any:
        if self.split == "train":
            numbers.append(number)
        return get(self, number)

    monkeypatch.setattr(ImageDataset, "__getitem__", noted)
    return numbers


@pytest.mark.parametrize("batch", ["4", "24"])
def test_with_steps_of_another_size_it_goes_on_at_the_same_image(
    batch: str, kept: Path, command: Command, opened: list[int]
) -> None:
    whole = ("fit", *QUICK, "--trainer.limit_train_batches", "1.0", "--data.val_fraction", "0.7")
    assert command(*whole, "--checkpoint.every_n_train_steps", "2").status == 0
    expected = opened.copy()
    images = len(expected) // 2
    assert sorted(expected) == list(range(2 * images))
    opened.clear()
    assert command(*whole, "--data.batch_size", batch, "--ckpt_path", str(kept / "step=4.ckpt")).status == 0
    # Every image once in each epoch, and those of the first four steps not again.
    assert opened == expected[4 * 8 :]


def test_explicit_values_beat_those_of_the_checkpoint(work: Path, command: Command) -> None:
    last = "runs/version_0/checkpoints/last.ckpt"
    changed = ("--model.optimizer.lr", "2e-4", "--model.optimizer.weight_decay", "0.2", "--model.label_smoothing", "0")
    assert command("fit", *QUICK, "--trainer.max_epochs", "3", *changed, "--ckpt_path", last).status == 0
    before, resumed = read_checkpoint(last), read_checkpoint("runs/version_1/checkpoints/last.ckpt")
    group = resumed["optimizer_states"][0]["param_groups"][1]
    assert group["initial_lr"] == 2e-4
    assert group["lr"] < 2e-4
    assert group["weight_decay"] == 0.2
    assert resumed["hyper_parameters"]["label_smoothing"] == 0
    # What is not given again is the checkpoint's.
    assert resumed["hyper_parameters"]["adapter"] == before["hyper_parameters"]["adapter"]
    assert resumed["global_step"] == before["global_step"] + 2


def test_steps_of_another_size_are_told_of(work: Path, command: Command, caplog: pytest.LogCaptureFixture) -> None:
    last = "runs/version_0/checkpoints/last.ckpt"
    more = ("fit", *QUICK, "--ckpt_path", last, "--trainer.max_epochs", "3")
    assert command(*more, "--trainer.accumulate_grad_batches", "2").status == 0
    assert "resume: a step has 16 images, and had 8 before" in caplog.text
    caplog.clear()
    assert command(*more).status == 0
    assert "resume: a step" not in caplog.text
