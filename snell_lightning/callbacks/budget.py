"""The budget between layers while a run trains: SNELLA's competition among layers, once an epoch."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from snell_lightning.adapters import UserError
from snell_lightning.adapters.budget import BudgetAllocator
from snell_lightning.adapters.injection import deltas


class LayerBudget(Callback):
    """Let layers compete for the entries that survive, fewer in every epoch.

    A run starts at the adapter's sparsity and ends at `target_sparsity`. Every process comes to the same shares, since
    they follow from values and averaged gradients that all have. The shares are in checkpoints and adapter files.

    Args:
        target_sparsity: Of all updates together at the end, in [0, 1).
        warmup_epochs: Epochs at the beginning in which the sparsity stays as it is.
        final_epochs: Epochs at the end in which it is the target's.
        interval: Epochs from one reallocation to the next.
        beta1: How slowly a layer's importance changes, in [0, 1).
        beta2: How slowly its wavering does, in [0, 1).

    Raises:
        UserError: The run has no number of epochs, too few for warm-up and end, or no adapter.
    """

    def __init__(
        self,
        target_sparsity: float,
        warmup_epochs: int = 0,
        final_epochs: int = 0,
        interval: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        self.target_sparsity, self.warmup_epochs, self.final_epochs = target_sparsity, warmup_epochs, final_epochs
        self.interval, self.beta1, self.beta2 = interval, beta1, beta2
        self.allocator: BudgetAllocator | None = None
        self._restored: dict[str, Any] | None = None
        self._step = 0
        self._shared_in = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the budget that the adapter starts with."""
        updates = deltas(pl_module)
        if not updates or trainer.max_epochs is None or trainer.max_epochs < 1:
            raise UserError("LayerBudget shares entries among adapted layers over trainer.max_epochs; give it both")
        shares = {name: delta.sparsity for name, delta in updates.items()}
        for delta in updates.values():
            # A checkpoint has brought its shares along.
            delta.sparsity = delta.config.sparsity
        self.allocator = BudgetAllocator(
            updates, self.target_sparsity, trainer.max_epochs, self.warmup_epochs, self.final_epochs, self.interval,
            self.beta1, self.beta2,
        )  # fmt: skip
        if self._restored is not None:
            self.allocator.load_state_dict({"averages": self._restored["averages"], "sparsity": shares})
            self._shared_in = self._restored["epoch"]
        self._step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Share the epoch's budget out; an epoch that is resumed has its shares already."""
        assert self.allocator is not None
        if self._shared_in != trainer.current_epoch:
            self._shared_in = trainer.current_epoch
            self.allocator.step(trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer's step, take the importance from what it made and the gradients that made it."""
        assert self.allocator is not None
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self.allocator.accumulate()

    def state_dict(self) -> dict[str, Any]:
        """The averages that importance follows from, and the epoch of the last shares, which are in the model."""
        if self.allocator is None:
            return {}
        return {"averages": self.allocator.state_dict()["averages"], "epoch": self._shared_in}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a run's averages when training starts."""
        self._restored = state_dict or None
