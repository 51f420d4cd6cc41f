"""Checkpoints to resume from, and the adapter file of the best epoch."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from snell_lightning.adapters import save_adapter
from snell_lightning.module import ImageClassifier
from snell_lightning.runs import ADAPTER


class AdapterCheckpoint(ModelCheckpoint):
    """Save after each epoch: `last.ckpt`, the best `epoch=N.ckpt`, and at each new best `adapter.safetensors`.

    Checkpoints hold trained tensors, optimizer, schedule, loops and the state of every process's random generators, and
    no frozen weight. The adapter file stands in the run's folder and is all that is needed to use the result.

    Of epochs that score the same the last one is kept: small validation sets are soon saturated.

    Args:
        monitor: Logged value that decides what is best; null takes the last epoch as the best.
        mode: Whether the best is the `max` or the `min`.
        dirpath: Folder of the checkpoints; by default `checkpoints` in the run's folder.
        save_top_k: How many of the best to keep.
        every_n_epochs: Save after every so many epochs.
    """

    def __init__(
        self,
        monitor: str | None = "val/acc1",
        mode: str = "max",
        dirpath: str | None = None,
        save_top_k: int = 1,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="{epoch}",
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=True,
            every_n_epochs=every_n_epochs,
            # At the end of the epoch the loops' counters stand where a resumed run goes on.
            save_on_train_epoch_end=True,
        )
        self.adapter_path: Path | None = None
        self._exported = ""
        self._random_states: list[dict[str, Any]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where the files go."""
        super().setup(trainer, pl_module, stage)
        # Reading `log_dir` talks to the other processes, so all of them do it here.
        folder = trainer.log_dir or trainer.default_root_dir
        if stage == "fit":
            self.adapter_path = Path(folder) / ADAPTER

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the random generators the state that a resumed run was stopped with."""
        super().on_train_start(trainer, pl_module)
        states, self._random_states = self._random_states, None
        if states is not None and len(states) == trainer.world_size:
            _set_random_state(states[trainer.global_rank])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save checkpoints, and the adapter if this epoch is the best so far."""
        super().on_train_epoch_end(trainer, pl_module)
        # Lightning writes `last.ckpt` only beside a new best; a run must be resumable from any epoch.
        due = (trainer.current_epoch + 1) % max(1, self._every_n_epochs) == 0
        if due and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        if self.best_model_path and self.best_model_path != self._exported:
            self._exported = self.best_model_path
            if trainer.is_global_zero and isinstance(pl_module, ImageClassifier):
                self._export(trainer, pl_module)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether this epoch is among the best. Where one is kept, it is the later of equals, which trained longer."""
        if super().check_monitor_top_k(trainer, current):
            return True
        return self.save_top_k == 1 and current is not None and bool(current == self.best_model_score)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save `last.ckpt` if that has not been done; a trial run (`fast_dev_run`) leaves no file."""
        if not self._should_skip_saving_checkpoint(trainer):
            super().on_train_end(trainer, pl_module)
        # A run that ends before its first validation has no best epoch, and is not to end without an adapter.
        unselected = not self.best_model_path and trainer.global_step > 0
        trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        if unselected and not trial and trainer.is_global_zero and isinstance(pl_module, ImageClassifier):
            self._export(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state of each process's random generators."""
        state = _random_state()
        states: list[Any] = [state]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, state)
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the random states until training starts."""
        self._random_states = checkpoint.get("random_states")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Carry the best epoch so far over into the folder of the resumed run; evaluation carries nothing."""
        if self.adapter_path is None:
            return
        best = Path(state_dict["best_model_path"])
        if state_dict["dirpath"] != self.dirpath and self.dirpath is not None and best.is_file():
            here = Path(self.dirpath) / best.name
            adapter = Path(state_dict["dirpath"]).parent / ADAPTER
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                here.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(best, here)
                if adapter.is_file():
                    shutil.copyfile(adapter, self.adapter_path)
            score = state_dict["best_model_score"]
            state_dict = {
                **state_dict,
                "dirpath": self.dirpath,
                "best_model_path": str(here),
                "best_k_models": {} if score is None else {str(here): score},
                "kth_best_model_path": str(here),
                "kth_value": state_dict["kth_value"] if score is None else score,
                "last_model_path": "",
            }
        super().load_state_dict(state_dict)
        self._exported = self.best_model_path

    def _export(self, trainer: Trainer, module: ImageClassifier) -> None:
        assert self.adapter_path is not None
        data: Any = getattr(trainer, "datamodule", None)
        values: dict[str, Any] = {"epoch": trainer.current_epoch}
        if self.monitor is not None and self.best_model_score is not None:
            values[self.monitor] = float(self.best_model_score)
        if hasattr(data, "settings"):
            values |= data.settings()
        save_adapter(
            self.adapter_path,
            module.model,
            module.adapter_config,
            module.backbone_name,
            frozen=module.frozen_fingerprint,
            num_classes=module.num_classes,
            backbone_args=module.backbone_args,
            pretrained=module.pretrained,
            **values,
        )


def _random_state() -> dict[str, Any]:
    """The state of this process's random generators, in types that load without running code."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            cached,
        ],
    }
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None
        state["accelerator"] = torch.get_device_module(device).get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "accelerator" in state and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None
        torch.get_device_module(device).set_rng_state(state["accelerator"])
