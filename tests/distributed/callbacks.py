"""Callbacks that jobs on test hosts are started with."""

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future


class CountBytes(Callback):
    """Write into `counted.json` how many bytes are reduced in an optimizer's step, and how many are trained."""

    def __init__(self) -> None:
        self.reduced = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what is reduced from here on."""

        def count(group: distributed.ProcessGroup, bucket: distributed.GradBucket) -> Future[Tensor]:
            self.reduced += bucket.buffer().nbytes
            return allreduce_hook(group, bucket)

        trainer.strategy.model.register_comm_hook(distributed.group.WORLD, count)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it down."""
        trained = sum(parameter.nbytes for parameter in pl_module.parameters() if parameter.requires_grad)
        frozen = sum(parameter.nbytes for parameter in pl_module.parameters() if not parameter.requires_grad)
        counted = {"reduced": self.reduced / trainer.global_step, "trained": trained, "frozen": frozen}
        if trainer.is_global_zero:
            Path("counted.json").write_text(json.dumps(counted))


class Fail(Callback):
    """Raise in one process.

    Args:
        rank: In which one.
        step: At which step; 0 is before there are data and a model.
    """

    def __init__(self, rank: int, step: int) -> None:
        self.step = step if int(os.environ["SLURM_PROCID"]) == rank else None
        if self.step == 0:
            self._fail()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Raise at the step."""
        if trainer.global_step == self.step:
            self._fail()

    def _fail(self) -> None:
        raise RuntimeError("the disk is on fire")
