"""Stop when the training loss is no longer a number, before such weights are saved."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from snell_lightning.adapters import UserError


class FiniteLoss(Callback):
    """Raise when a training loss was NaN or infinite, naming the first step at which it was, and save no such weights.

    The step is noted on the device and read by the host at the trainer's logging interval, before validation and before
    a checkpoint is written, so that no step waits for it. On the CPU it is read at every step.

    Raises:
        UserError: The loss, or a trained weight that was to be saved, was not finite.
    """

    def __init__(self) -> None:
        self._step = 0
        self._first_bad: Tensor | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the step in progress: where gradients accumulate, the trainer counts it only at its last batch."""
        self._step = trainer.global_step + 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note whether this step's loss is finite."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not isinstance(loss, Tensor):
            return
        if self._first_bad is None:
            self._first_bad = torch.zeros((), dtype=torch.long, device=loss.device)
        bad_now = ~torch.isfinite(loss.detach()) & (self._first_bad == 0)
        self._first_bad = torch.where(bad_now, self._step, self._first_bad)
        if loss.device.type == "cpu" or trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._check(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before time is spent on validation."""
        self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look before anything is written, also at the weights: the last step may have spoilt them unnoticed."""
        self._check(trainer)
        trained = [p.to_local() if isinstance(p, DTensor) else p for p in pl_module.parameters() if p.requires_grad]
        if trained and not torch.stack([torch.isfinite(p).all() for p in trained]).all():
            raise UserError(f"a trained weight is not a number after step {trainer.global_step}{_advice(trainer)}")

    def _check(self, trainer: Trainer) -> None:
        if self._first_bad is None or not (step := int(self._first_bad)):
            return
        raise UserError(f"the training loss is not a number at step {step}{_advice(trainer)}")


def _advice(trainer: Trainer) -> str:
    """Where to go on from, and what to change."""
    saved = trainer.checkpoint_callback
    path = getattr(saved, "last_model_path", "") or getattr(saved, "best_model_path", "") or "none yet"
    return (
        f" (epoch {trainer.current_epoch}); last good checkpoint: {path}; lower model.optimizer.lr, or use "
        "trainer.precision bf16-mixed or 32-true in place of 16-mixed"
    )
