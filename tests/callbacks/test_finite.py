"""A run whose loss or weights are no numbers any more stops, says where, and saves nothing of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from snell_lightning import UserError
from snell_lightning.callbacks import AdapterCheckpoint, FiniteLoss

from .conftest import MakeTrainer, loader, make_classifier


class Spoil(Callback):
    """Makes the loss of one batch NaN, or the weights after it."""

    def __init__(self, batch: int, what: str = "loss", value: float = float("nan")) -> None:
        self.batch, self.what, self.value, self.seen = batch, what, value, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if self.seen == self.batch and self.what == "loss":
            batch[0].mul_(self.value)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.seen == self.batch and self.what == "weights":
            with torch.no_grad():
                pl_module.model.head.weight[0, 0] = self.value  # type: ignore[union-attr,index,operator]


@pytest.mark.parametrize("bad", [1, 2, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_bad_step_is_named(bad: int, value: float, make_trainer: MakeTrainer) -> None:
    run = make_trainer(callbacks=[Spoil(bad, value=value), FiniteLoss()], max_epochs=2)
    with pytest.raises(UserError, match=rf"not a number at step {bad} \(epoch {(bad - 1) // 3}\)"):
        run.fit(make_classifier(), loader(3))


def test_the_step_is_the_optimizers_where_gradients_accumulate(make_trainer: MakeTrainer) -> None:
    # Of batches 1 and 2, and of 3 and 4, one step is made each.
    for bad, step in {1: 1, 2: 1, 3: 2}.items():
        run = make_trainer(callbacks=[Spoil(bad), FiniteLoss()], accumulate_grad_batches=2)
        with pytest.raises(UserError, match=f"at step {step} "):
            run.fit(make_classifier(), loader(4))


def test_what_was_noted_on_the_device_is_read_before_validation_and_before_saving() -> None:
    check = FiniteLoss()
    check._first_bad = torch.tensor(7)
    trainer: Any = SimpleNamespace(current_epoch=2, global_step=9, checkpoint_callback=None)
    with pytest.raises(UserError, match="at step 7 "):
        check.on_validation_start(trainer, make_classifier())
    with pytest.raises(UserError, match="at step 7 "):
        check.on_save_checkpoint(trainer, make_classifier(), {})


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_nothing_is_saved_of_a_spoilt_epoch_and_the_last_good_checkpoint_is_named(
    what: str, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    # Each epoch has two steps; the last step of the second one is spoilt.
    run = make_trainer(
        callbacks=[Spoil(4, what), FiniteLoss(), AdapterCheckpoint(monitor=None)],
        max_epochs=3,
        default_root_dir=tmp_path,
        enable_checkpointing=True,
    )
    with pytest.raises(
        UserError, match=r"not a number (at|after) step 4 \(epoch 1\); last good checkpoint: .*last\.ckpt"
    ):
        run.fit(make_classifier(), loader(2))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"epoch=0.ckpt", "last.ckpt"}
    for path in (tmp_path / "checkpoints").iterdir():
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["epoch"] == 0
        assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


def test_a_sound_run_is_left_alone(make_trainer: MakeTrainer) -> None:
    run = make_trainer(callbacks=[FiniteLoss()], max_epochs=2)
    run.fit(make_classifier(), loader(2), loader(1))
    assert run.global_step == 4
