"""What validation and testing say class by class, in files and in TensorBoard."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as reference
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from snell_lightning import ImageDataModule, load_classifier
from snell_lightning.callbacks.report import ClassReport, Report

from .conftest import QUICK, Command

RUN = Path("runs") / "version_0"


def rows(path: Path) -> list[dict[str, str]]:
    """Of a table with a header."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def predictions(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of the digits of a split, the classes that the run's adapter takes them for, and their probabilities."""
    data = ImageDataModule("digits", augmentation="light")
    classifier = load_classifier(RUN / "adapter.safetensors", "cpu")
    samples = getattr(data.splits, split)
    found = classifier.predict([data.splits.open_image(source) for source, _ in samples], top_k=1)
    taken_for = [data.class_names.index(prediction.label) for prediction in found]
    return np.array([label for _, label in samples]), np.array(taken_for), np.array([one.probability for one in found])


def check_tables(folder: Path, stage: str, split: str) -> None:
    """That the files say of the whole split what scikit-learn says of the adapter's predictions."""
    labels, taken_for, likely = predictions(split)
    *classes, means = rows(folder / f"{stage}_classes.csv")
    expected = reference.precision_recall_fscore_support(labels, taken_for, zero_division=0)
    for name, values in zip(("precision", "recall", "f1", "images"), expected, strict=True):
        assert [float(row[name]) for row in classes] == pytest.approx(values, abs=1e-6)
    assert float(means["recall"]) == pytest.approx(reference.balanced_accuracy_score(labels, taken_for), abs=1e-6)
    assert float(means["f1"]) == pytest.approx(
        reference.f1_score(labels, taken_for, average="macro", zero_division=0), abs=1e-6
    )
    matrix = [[int(row[str(column)]) for column in range(10)] for row in rows(folder / f"{stage}_confusion.csv")]
    assert np.array_equal(matrix, reference.confusion_matrix(labels, taken_for))
    wrong = sorted(np.flatnonzero(labels != taken_for), key=lambda place: -likely[place])[:25]
    said = rows(folder / f"{stage}_wrong.csv")
    assert [float(row["probability"]) for row in said] == pytest.approx(likely[wrong], abs=1e-4)
    assert {(row["image"], row["class"], row["taken_for"]) for row in said} == {
        (str(place), str(labels[place]), str(taken_for[place])) for place in wrong
    }


def test_of_fit_they_are_the_best_epochs_whose_adapter_is_saved(
    work: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    done = command(
        "fit", *QUICK, "--trainer.limit_val_batches", "1.0", "--trainer.limit_train_batches", "8",
        "--trainer.max_epochs", "3", "--trainer.logger.version", "again",
    )  # fmt: skip
    assert done.status == 0, done.err

    os.rename("runs/again", "runs/moved")
    os.rename(RUN, "runs/before")
    os.rename("runs/moved", RUN)
    check_tables(RUN, "val", "val")
    for name in ("confusion", "wrong"):
        assert min(Image.open(RUN / f"val_{name}.png").size) > 100
    events = EventAccumulator(str(RUN)).Reload()
    assert set(events.Tags()["images"]) == {"val/confusion", "val/wrong"}
    assert "classes: balanced accuracy 0." in caplog.text


@pytest.mark.parametrize("devices", ["1", "2"])
def test_of_test_they_are_the_same_whatever_the_number_of_processes(work: Path, command: Command, devices: str) -> None:
    arguments = ["test", "--config", str(RUN / "config.yaml"), "--trainer.devices", devices]
    if devices == "1":
        assert command(*arguments).status == 0
    else:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        program = [sys.executable, "-m", "snell_lightning", *arguments]
        done = subprocess.run(program, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr

    check_tables(Path("runs") / "test_0", "test", "test")
    assert len(list((Path("runs") / "test_0").glob("test_*.png"))) == 2


RIGHT = [0, 1, 2, 3] * 10


class TestEndingNoBetterThanGuessing:
    SAID = "at the end validation was no better than guessing (balanced accuracy "

    def test_is_said_with_the_rate_to_try(self, work: Path, command: Command, recwarn: pytest.WarningsRecorder) -> None:
        done = command("fit", *QUICK, "--trainer.limit_train_batches", "12", "--model.optimizer.lr", "1.0")

        assert done.status == 0, done.err
        (said,) = [str(one.message) for one in recwarn if self.SAID in str(one.message)]
        assert "): model.optimizer.lr, 1, is probably too high or far too low; try a third of it" in said

    @pytest.mark.parametrize(
        ("best", "last", "steps", "expected"),
        [
            (RIGHT, [1] * 40, 30, "; try a third of it. The adapter that is saved is of step 10, before that"),
            ([1] * 40, [1] * 40, 30, " or far too low; try a third of it, and ten times as much"),
            # What was learnt is still there; too few steps; too few images.
            (RIGHT, [*RIGHT[4:], 1, 1, 1, 1], 30, None),
            ([1] * 40, [1] * 40, 19, None),
            ([1] * 16, [1] * 16, 30, None),
        ],
    )
    def test_is_told_from_what_was_never_learnt(
        self, best: list[int], last: list[int], steps: int, expected: str | None
    ) -> None:
        callback = ClassReport()
        labels = np.array([0, 1, 2, 3] * (len(last) // 4))
        callback.best = Report("val", tuple("abcd"), labels, np.array(best), (), 10)
        callback._labels, callback._taken_for = [torch.tensor(labels)], [torch.tensor(last)]
        optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "initial_lr": 0.012}])

        said = callback._lost(SimpleNamespace(global_step=steps, optimizers=[optimizer]))

        assert said == (expected and f"{self.SAID}0.2500): model.optimizer.lr, 0.012, is probably too high{expected}")


def test_another_metric_chooses_the_epoch_and_the_classes_are_balanced(work: Path, command: Command) -> None:
    done = command(
        "fit", *QUICK, "--model.metric", "macro_f1", "--data.class_weights", "balanced", "--report.pictures", "false"
    )

    assert done.status == 0, done.err
    assert "best val/macro_f1" in done.out
    folder = Path("runs") / "version_1"
    assert not list(folder.glob("*.png"))
    assert {"val/macro_f1", "val/acc1"} <= set(rows(folder / "metrics.csv")[0])


def test_auroc_of_ten_classes_is_refused(work: Path, command: Command) -> None:
    done = command("fit", *QUICK, "--model.metric", "auroc")

    assert done.errors == ["error: model.metric auroc is of two classes, and there are 10; choose macro_f1"]
