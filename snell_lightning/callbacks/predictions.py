"""Write what `predict` finds to a CSV file."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from snell_lightning.adapters import UserError
from snell_lightning.runs import short


class PredictionWriter(BasePredictionWriter):
    """One line per image: the image, the most probable class and its probability, or why it could not be read.

    The file is `predictions.csv` in the run's folder; with several processes each writes `predictions.RANK.csv` with
    its share of the images.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self.path: Path | None = None
        self.written = self.unreadable = 0

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the file."""
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        name = "predictions.csv" if trainer.world_size == 1 else f"predictions.{trainer.global_rank}.csv"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / name
        self.written = self.unreadable = 0
        self._write([("image", "class", "probability", "error")], "w")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Tensor,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Add a batch of probabilities `(batch, num_classes)`."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        loader: Any = trainer.predict_dataloaders
        unreadable = loader.dataset.unreadable
        probabilities, labels = prediction.float().cpu().max(-1)
        rows = []
        for index, label, probability in zip(batch_indices or (), labels.tolist(), probabilities.tolist(), strict=True):
            image = loader.dataset.name(index)
            if index in unreadable:
                rows.append((image, "", "", unreadable[index]))
                self.unreadable += 1
            else:
                rows.append((image, data.class_names[label], f"{probability:.6f}", ""))
        self.written += len(rows)
        self._write(rows, "a")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the file is.

        Raises:
            UserError: Not one image could be read.
        """
        assert self.path is not None
        counts = torch.tensor([self.written, self.unreadable], device=pl_module.device)
        written, unreadable = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if written and written == unreadable:
            raise UserError(f"none of the {written} images could be read; the reasons are in {short(self.path)}")
        bad = f", {unreadable:,} unreadable" if unreadable else ""
        rank_zero_info(f"predictions: {short(self.path)} ({written:,} images{bad})")

    def _write(self, rows: Sequence[tuple], mode: str) -> None:
        assert self.path is not None
        # File names need not be UTF-8: they are written as they are.
        with self.path.open(mode, newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(rows)
