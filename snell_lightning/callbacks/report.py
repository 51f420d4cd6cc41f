"""What an evaluation says class by class: precision and recall, who is taken for whom, and which images go most wrong.

Beside the run's other files, for validation (`val_`) and for testing (`test_`):

    val_classes.csv       class, precision, recall, f1, images; then the means over the classes
    val_confusion.csv     rows are what an image is, columns what it is taken for
    val_wrong.csv         the images that are most confidently wrong
    val_confusion.png     the same two to look at, in TensorBoard too
    val_wrong.png

In `fit` they are of the epoch that is the best so far, whose adapter is saved.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from snell_lightning.adapters.whole import whole
from snell_lightning.callbacks.pictures import Wrong, draw_confusion, draw_wrong
from snell_lightning.data.dataset import ImageDataset
from snell_lightning.data.samplers import ShardSampler
from snell_lightning.runs import short

# A matrix of more classes is no longer read, by nobody.
_CLASSES = 1000
# With fewer steps or images, a bad score may mean nothing.
_STEPS, _IMAGES = 20, 20


@dataclass(frozen=True)
class Report:
    """An evaluation, over all processes.

    Attributes:
        stage: `val` or `test`, or what validation is called.
        classes: Their names.
        labels: What each image is, `(images,)`.
        taken_for: What each was taken for.
        wrong: The most confidently wrong ones, the worst first.
        step: Of the optimizer.
    """

    stage: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    taken_for: NDArray[np.int64]
    wrong: tuple[Wrong, ...]
    step: int


class ClassReport(Callback):
    """Write what validation and testing say class by class.

    Args:
        worst: Number of the most confidently wrong images to name, at least 0.
        pictures: Draw the confusion matrix, of up to 100 classes, and the most confidently wrong images.
    """

    def __init__(self, worst: int = 25, pictures: bool = True) -> None:
        self.worst, self.pictures = worst, pictures
        self.best: Report | None = None
        self._log_dir: str | None = None
        self._clear()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where the files go."""
        # Reading `log_dir` talks to the other processes, so all of them do it here.
        self._log_dir = trainer.log_dir

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._clear()

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Note what the batch's images were taken for."""
        if not trainer.sanity_checking:
            self._note(trainer.val_dataloaders, outputs, batch, batch_idx)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Note what the batch's images were taken for."""
        self._note(trainer.test_dataloaders, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where validation is all there is to do, write what it said."""
        if trainer.state.fn == "validate":
            self._finish(trainer, self._collect(trainer, pl_module, _validation(pl_module)), self.pictures)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what testing said."""
        self._finish(trainer, self._collect(trainer, pl_module, "test"), self.pictures)

    def keep(self, trainer: Trainer, module: LightningModule) -> None:
        """The validation that ends is the best so far: write its tables. Every process calls it."""
        self.best = self._collect(trainer, module, _validation(module))
        self._finish(trainer, self.best, pictures=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the best epoch's tables say and whether the last one had lost it again, and draw its pictures."""
        if (lost := self._lost(trainer)) is not None:
            rank_zero_warn(lost)
        if self.best is None or self._log_dir is None:
            return
        rank_zero_info(describe(self.best, Path(self._log_dir)))
        if self.pictures:
            self._draw(trainer, self.best)

    def _lost(self, trainer: Trainer) -> str | None:
        """What to say of a run that ended no better than guessing; None of any other."""
        if trainer.global_step < _STEPS or sum(map(len, self._labels)) < _IMAGES:
            return None
        last = Report("", (), torch.cat(self._labels).numpy(), torch.cat(self._taken_for).numpy(), (), 0)
        if not _guesses(last):
            return None
        rate = max(group.get("initial_lr", group["lr"]) for group in trainer.optimizers[0].param_groups)
        said = (
            f"at the end validation was no better than guessing (balanced accuracy {balanced_accuracy(last):.4f}): "
            f"model.optimizer.lr, {rate:g}, is probably too high"
        )
        if self.best is None or _guesses(self.best):
            return f"{said} or far too low; try a third of it, and ten times as much"
        return f"{said}; try a third of it. The adapter that is saved is of step {self.best.step}, before that"

    def _clear(self) -> None:
        self._labels: list[Tensor] = []
        self._taken_for: list[Tensor] = []
        self._wrong: list[Wrong] = []
        self._order: list[int] | None = None

    def _note(self, loader: Any, outputs: Any, batch: Any, number: int) -> None:
        """Keep labels and classes of a batch, and what is most confidently wrong so far."""
        if not isinstance(outputs, Tensor) or not len(outputs):
            return
        probabilities, taken_for = outputs.float().softmax(-1).max(-1)
        labels = batch[1]
        self._labels.append(labels.cpu())
        self._taken_for.append(taken_for.cpu())
        wrong = (taken_for != labels).nonzero().flatten().tolist()
        if not wrong or not self.worst:
            return
        indices = self._indices(loader, number, len(labels))
        dataset = getattr(loader, "dataset", None)
        for place in wrong:
            source, named = None, ""
            if indices is not None and isinstance(dataset, ImageDataset):
                source, named = dataset.samples[indices[place]][0], dataset.name(indices[place])
            self._wrong.append(
                Wrong(float(probabilities[place]), named, int(labels[place]), int(taken_for[place]), source)
            )
        self._wrong = sorted(self._wrong, key=lambda one: -one.probability)[: self.worst]

    def _indices(self, loader: Any, number: int, count: int) -> list[int] | None:
        """Which images of the data set a batch holds; None where that cannot be told."""
        batches: Any = getattr(loader, "batch_sampler", None)
        sampler = getattr(batches, "sampler", None)
        if not isinstance(sampler, ShardSampler):
            return None
        if self._order is None:
            self._order = list(sampler)
        size: int = batches.batch_size
        bad = loader.dataset.unreadable
        found = [index for index in self._order[number * size : (number + 1) * size] if index not in bad]
        return found if len(found) == count else None

    def _collect(self, trainer: Trainer, module: LightningModule, stage: str) -> Report | None:
        """What all processes noted; None where there is nothing."""
        none = torch.zeros(0, dtype=torch.long)
        own = (
            torch.cat([none, *self._labels]).numpy(), torch.cat([none, *self._taken_for]).numpy(), self._wrong,
        )  # fmt: skip
        every: list[Any] = [own]
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            every = [None] * trainer.world_size
            torch.distributed.all_gather_object(every, own)
        labels, taken_for = (np.concatenate([process[part] for process in every]) for part in (0, 1))
        if not len(labels):
            return None
        names = getattr(module, "class_names", None) or tuple(map(str, range(1 + max(labels.max(), taken_for.max()))))
        wrong = sorted((one for process in every for one in process[2]), key=lambda one: -one.probability)
        return Report(stage, tuple(names), labels, taken_for, tuple(wrong[: self.worst]), trainer.global_step)

    def _finish(self, trainer: Trainer, report: Report | None, pictures: bool) -> None:
        """Write the tables, and draw the pictures if they are wanted."""
        if report is None or self._log_dir is None or not trainer.is_global_zero:
            return
        write_tables(report, Path(self._log_dir))
        if trainer.state.fn != "fit":
            rank_zero_info(describe(report, Path(self._log_dir)))
        if pictures:
            self._draw(trainer, report)

    def _draw(self, trainer: Trainer, report: Report) -> None:
        if self._log_dir is None or not trainer.is_global_zero:
            return
        drawn = {"confusion": draw_confusion(report.classes, confusion(report))}
        opener = getattr(getattr(getattr(trainer, "datamodule", None), "splits", None), "open_image", None)
        if opener is not None and report.wrong:
            drawn["wrong"] = draw_wrong(report.classes, report.wrong, opener)
        for name, picture in drawn.items():
            if picture is None:
                continue
            with whole(Path(self._log_dir) / f"{report.stage}_{name}.png") as part:
                picture.save(part, format="png")
            for logger in trainer.loggers:
                add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
                if add_image is not None:
                    add_image(f"{report.stage}/{name}", np.asarray(picture), report.step, dataformats="HWC")


def _validation(module: LightningModule) -> str:
    """What validation is called where it is logged."""
    return str(getattr(module, "logged_as", {}).get("val", "val"))


def describe(report: Report, folder: Path) -> str:
    """The scores over classes and the worst class, in one line."""
    recalls = {label: (report.taken_for[report.labels == label] == label).mean() for label in np.unique(report.labels)}
    worst = min(recalls, key=lambda label: recalls[label])
    images = int((report.labels == worst).sum())
    return (
        f"classes: balanced accuracy {balanced_accuracy(report):.4f}; lowest recall {recalls[worst]:.4f}, of "
        f"{report.classes[worst]} ({images} images); {short(folder / f'{report.stage}_classes.csv')}"
    )


def confusion(report: Report) -> NDArray[np.int64]:
    """`(classes, classes)`: how many images of the row's class were taken for the column's."""
    count = len(report.classes)
    return np.bincount(report.labels * count + report.taken_for, minlength=count * count).reshape(count, count)


def write_tables(report: Report, folder: Path) -> None:
    """Write the CSV files into a folder."""
    from sklearn.metrics import precision_recall_fscore_support

    labels, found, places = report.labels, report.taken_for, range(len(report.classes))
    each = precision_recall_fscore_support(labels, found, labels=list(places), zero_division=0)
    rows: list[Sequence[Any]] = [
        (name, *(f"{value:.6f}" for value in values[:3]), int(values[3]))
        for name, values in zip(report.classes, np.stack(each, 1), strict=True)
    ]
    precision, _, f1, _ = precision_recall_fscore_support(labels, found, average="macro", zero_division=0)
    means = (f"{value:.6f}" for value in (precision, balanced_accuracy(report), f1))
    rows.append(("mean over classes", *means, len(labels)))
    _write(folder / f"{report.stage}_classes.csv", [("class", "precision", "recall", "f1", "images"), *rows])
    if len(report.classes) <= _CLASSES:
        matrix = confusion(report)
        named = [(name, *row) for name, row in zip(report.classes, matrix.tolist(), strict=True)]
        _write(folder / f"{report.stage}_confusion.csv", [("class", *report.classes), *named])
    _write(
        folder / f"{report.stage}_wrong.csv",
        [
            ("image", "class", "taken_for", "probability"),
            *(
                (one.image, report.classes[one.label], report.classes[one.taken_for], f"{one.probability:.6f}")
                for one in report.wrong
            ),
        ],
    )


def balanced_accuracy(report: Report) -> float:
    """Mean of the recalls of the classes that have images."""
    labels, found = report.labels, report.taken_for
    return float(np.mean([(found[labels == label] == label).mean() for label in np.unique(labels)]))


def _guesses(report: Report) -> bool:
    """Whether the images are told apart no better than by chance, or by so little that it may be chance."""
    classes = len(np.unique(report.labels))
    return classes > 1 and balanced_accuracy(report) <= min(1.5 / classes, 1 / classes + 0.05)


def _write(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    with whole(path) as part, part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows(rows)
