"""What is scored in evaluation: exact over the whole set and over all processes, not means of batch means."""

from typing import Literal

from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from snell_lightning.adapters.errors import UserError

SelectionMetric = Literal["accuracy", "balanced_accuracy", "macro_f1", "auroc"]


class BalancedAccuracy(MulticlassConfusionMatrix):
    """Mean of the recalls of those classes that have images, as scikit-learn's `balanced_accuracy_score`.

    torchmetrics' own mean counts a class without images, once it is predicted, as 0.
    """

    def compute(self) -> Tensor:
        """The score, in [0, 1]."""
        matrix = super().compute().double()
        images = matrix.sum(1)
        return (matrix.diag()[images > 0] / images[images > 0]).mean()


def stage_metrics(stage: str, num_classes: int, metric: SelectionMetric) -> nn.ModuleDict:
    """`loss`, and `scores` by the names that they are logged under.

    Args:
        stage: What they are called by: `val`, `test` or the like.
        num_classes: Number of classes.
        metric: Is among the scores, whatever the others are.

    Raises:
        UserError: The metric is of two classes, and there are more or fewer.
    """
    # With five classes or fewer the right one is always among the top five.
    ranks = (1, 5) if num_classes > 5 else (1,)
    scores: dict[str, Metric | MetricCollection] = {
        f"{stage}/acc{k}": MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in ranks
    }
    name = f"{stage}/{metric}"
    if metric == "balanced_accuracy":
        scores[name] = BalancedAccuracy(num_classes)
    elif metric == "macro_f1":
        scores[name] = MulticlassF1Score(num_classes, average="macro")
    elif metric == "auroc":
        if num_classes != 2:
            raise UserError(f"model.metric auroc is of two classes, and there are {num_classes}; choose macro_f1")
        scores[name] = MulticlassAUROC(num_classes)
    return nn.ModuleDict({"loss": MeanMetric(), "scores": MetricCollection(scores, compute_groups=False)})
