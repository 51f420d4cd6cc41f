"""An exponential moving average of what is trained, beside the frozen weights that there are."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from snell_lightning.adapters.config import check_fraction


class AdapterEMA(WeightAveraging):
    """Average the trained tensors over steps; validation, checkpoints' best and the adapter file are of the averages.

    Lightning's `EMAWeightAveraging` holds a second copy of the whole model, and averages frozen weights too. Here the
    copy's frozen tensors are the model's own, and stay as they are, bit for bit.

    Args:
        decay: Share of the average that a step keeps, in [0, 1); 0.9999 in SNELLA's published runs on FGVC.

    Raises:
        UserError: The decay is out of its range.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        check_fraction("decay", decay)
        super().__init__(avg_fn=_Moving(decay))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the copy where the model is, and with its frozen tensors."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)
        own = dict(pl_module.named_parameters())
        for name, average in self._average_model.module.named_parameters():
            if not own[name].requires_grad:
                average.data = own[name].data


class _Moving:
    """What AveragedModel makes of an average and a new value."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def __call__(self, average: Tensor, current: Tensor, _: Any) -> Tensor:
        if average.data_ptr() == current.data_ptr():
            return average
        return torch.lerp(average, current, 1 - self.decay)
