"""Scores by which the best epoch is chosen: what scikit-learn says of the same predictions."""

import pytest
import torch
from sklearn import metrics as reference

from snell_lightning import UserError
from snell_lightning.metrics import stage_metrics


def scored(metric: str, logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The score of predictions that come in three batches."""
    scores = stage_metrics("val", logits.shape[1], metric)["scores"]
    for place in (slice(0, 7), slice(7, 40), slice(40, None)):
        scores.update(logits[place], labels[place])
    return float(scores.compute()[f"val/{metric}"])


def predictions(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right more often than not, of classes that are not equally frequent."""
    labels = torch.multinomial(torch.arange(1.0, classes + 1), 90, replacement=True)
    return torch.randn(90, classes) + 2 * torch.nn.functional.one_hot(labels, classes), labels


def test_balanced_accuracy_and_macro_f1() -> None:
    logits, labels = predictions(6)
    found = logits.argmax(1)

    assert scored("balanced_accuracy", logits, labels) == pytest.approx(
        reference.balanced_accuracy_score(labels, found)
    )
    assert scored("macro_f1", logits, labels) == pytest.approx(reference.f1_score(labels, found, average="macro"))


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_a_class_without_images_does_not_count_even_where_it_is_predicted() -> None:
    logits, labels = predictions(6)
    logits[:5, 2] += 10
    logits, labels = logits[labels != 2], labels[labels != 2]
    found = logits.argmax(1)
    assert 2 in found

    assert scored("balanced_accuracy", logits, labels) == pytest.approx(
        reference.balanced_accuracy_score(labels, found)
    )
    assert scored("macro_f1", logits, labels) == pytest.approx(reference.f1_score(labels, found, average="macro"))


def test_auroc_is_of_two_classes() -> None:
    logits, labels = predictions(2)

    assert scored("auroc", logits, labels) == pytest.approx(reference.roc_auc_score(labels, logits.softmax(1)[:, 1]))
    with pytest.raises(UserError, match="auroc is of two classes, and there are 3"):
        stage_metrics("val", 3, "auroc")
