"""What is wrong with a run before it starts: told in one line, and no folder is made for it."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateFinder, StochasticWeightAveraging
from torch.nn.modules.batchnorm import _BatchNorm

from snell_lightning.adapters import UserError
from snell_lightning.callbacks.checkpoint import AUTO
from snell_lightning.module import ImageClassifier

# Settings that count something.
_AT_LEAST_ONE = ("accumulate_grad_batches", "num_nodes", "check_val_every_n_epoch", "log_every_n_steps", "timeout")
# Settings of which zero means that nothing is trained.
_NOTHING = ("max_epochs", "max_steps", "limit_train_batches")


def check_trainer_settings(trainer: Mapping[str, Any]) -> None:
    """Check settings of the trainer that Lightning lets pass and fails on later.

    Raises:
        UserError: One is out of its range, or leaves no result.
    """
    for name in _AT_LEAST_ONE:
        value = trainer.get(name)
        if value is not None and value < 1:
            raise UserError(f"trainer.{name} is {value}; expected a whole number of at least 1")
    if trainer.get("barebones"):
        raise UserError(
            "trainer.barebones trains without checkpoints, curves and progress, so that nothing is left of it; to time "
            "a run or to try it out, use trainer.fast_dev_run"
        )


def check_training(trainer: Trainer, module: LightningModule) -> None:
    """Check what training needs: an optimizer that takes the parameters, and callbacks that find their metrics.

    Raises:
        UserError: Something would fail later.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for name in _NOTHING:
        if getattr(trainer, name) == 0:
            raise UserError(f"trainer.{name} is 0: nothing would be trained")
    if trainer.max_epochs == trainer.max_steps == -1:
        raise UserError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    if any(isinstance(callback, BaseFinetuning) for callback in callbacks):
        raise UserError(
            "callbacks that freeze and unfreeze layers are for full fine-tuning: here the backbone stays frozen, and "
            "model.adapter says what is trained; leave them out"
        )
    if any(isinstance(callback, LearningRateFinder) for callback in callbacks):
        raise UserError(
            "LearningRateFinder sets one constant learning rate, and here it follows a schedule; leave it out and try "
            "a few values of model.optimizer.lr"
        )
    averages = any(isinstance(callback, StochasticWeightAveraging) for callback in callbacks)
    if averages and any(isinstance(part, _BatchNorm) and part.track_running_stats for part in module.modules()):
        raise UserError(
            "StochasticWeightAveraging measures the statistics of batch norms anew, and those of this backbone are "
            "frozen; use lightning.pytorch.callbacks.WeightAveraging or EMAWeightAveraging"
        )
    if isinstance(module, ImageClassifier):
        module.check_optimizer()
        _check_monitored(callbacks, module)


def _check_monitored(callbacks: Sequence[Callback], module: ImageClassifier) -> None:
    """Raise where a callback waits for a metric that is not logged; callbacks of the user's own may log others."""
    if any(not type(each).__module__.startswith(("lightning.", "snell_lightning.")) for each in callbacks):
        return
    logged = module.logged_names()
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor not in (AUTO, *logged):
            near = difflib.get_close_matches(monitor, logged, n=1)
            hint = f"did you mean {near[0]}?" if near else f"logged are {', '.join(logged)}"
            raise UserError(f"{type(callback).__name__} monitors {monitor}, which is not logged; {hint}")
