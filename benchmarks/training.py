"""One training run of `benchmarks.accuracy` and `benchmarks.rates`: the same plain loop for every method.

AdamW over what the method trains, with weight decay 0.01 on matrices, batches of 16 in an order that the seed gives, a
learning rate that rises and then falls along a cosine to zero, as `vit.yaml` has it. After each epoch the validation
images are scored; what the best epoch trained is kept.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tasks import Split
from snell_lightning.schedule import long_enough, warmup_cosine

BATCH = 16
WARMUP = 0.1  # of all steps
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        accuracy: On the validation images after each epoch, in [0, 1].
        loss: Likewise.
        best: The state of the best epoch's trained tensors: highest accuracy, then lowest loss.
        steps: Of the optimizer.
    """

    accuracy: list[float]
    loss: list[float]
    best: dict[str, Tensor]
    steps: int

    @property
    def selected(self) -> int:
        """The best epoch, from 0."""
        return max(range(len(self.accuracy)), key=lambda epoch: (self.accuracy[epoch], -self.loss[epoch]))


def train(model: nn.Module, data: dict[str, Split], rate: float, epochs: int, seed: int) -> Outcome:
    """Train on `train`, score on `val`.

    Args:
        model: With `requires_grad` set on what is trained.
        data: The splits.
        rate: Highest learning rate.
        epochs: Passes over the training images.
        seed: Of the images' order and of whatever a method draws.
    """
    torch.manual_seed(seed)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in trained.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    images, labels = data["train"].images, data["train"].labels
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(steps, long_enough(WARMUP, steps), 0.0, 0.0))
    accuracy: list[float] = []
    losses: list[float] = []
    best: dict[str, Tensor] = {}
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(labels))
        for batch in order[: len(labels) // BATCH * BATCH].split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        scored = score(model, data["val"])
        accuracy.append(scored[0])
        losses.append(scored[1])
        if Outcome(accuracy, losses, {}, 0).selected == epoch:
            best = {name: value.detach().clone() for name, value in _state(model, set(trained)).items()}
    optimizer.zero_grad(set_to_none=True)
    return Outcome(accuracy, losses, best, steps)


@torch.no_grad()
def score(model: nn.Module, split: Split) -> tuple[float, float]:
    """Accuracy in [0, 1] and mean cross-entropy, in evaluation mode."""
    model.eval()
    logits = torch.cat([model(images) for images in split.images.split(4 * BATCH)])
    right = (logits.argmax(1) == split.labels).double().mean().item()
    loss = F.cross_entropy(logits, split.labels).item()
    return right, loss if math.isfinite(loss) else math.inf


def restore(model: nn.Module, best: dict[str, Tensor]) -> None:
    """Put the best epoch's tensors back."""
    model.load_state_dict(best, strict=False)


def _state(model: nn.Module, trained: set[str]) -> dict[str, Any]:
    """What training changes: parameters, and the buffers beside them."""
    buffers = {name for name, _ in model.named_buffers()}
    return {name: value for name, value in model.state_dict().items() if name in trained or name in buffers}
