"""The budget between layers (SNELLA): how many entries of each update survive, by how much each update matters.

    every optimizer step   importance of each factor entry, |value x gradient|, smoothed, and how much it wavers
    every epoch, or more   score of an update = mean of importance x wavering; budget of all, which shrinks; shares

The budget of all updates together goes from what their sparsity leaves at first to what the target leaves, along a
cubic, and is dealt out in proportion to the scores. Nothing is stored but the averages, of the factors' shapes.

Source: SNELLA (arXiv 2510.24037), section 4, and its released code.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from snell_lightning.adapters.config import check_fraction
from snell_lightning.adapters.errors import UserError
from snell_lightning.adapters.update.delta import SnellDelta


class BudgetAllocator:
    """Sets the sparsity of updates while they are trained.

    An update that gets all of its entries keeps its sparsifier, as in the released code: its sparsity is half an entry.
    None gets fewer than one entry.

    Args:
        deltas: Updates by name; their sparsity is the initial one.
        target_sparsity: Of all entries together at the end, in [0, 1).
        total_steps: Number of calls of `step` in all.
        warmup_steps: Calls at the beginning at which nothing changes.
        final_steps: Calls at the end at which the budget is the target's.
        interval: Calls from one reallocation to the next.
        beta1: How slowly importance changes, in [0, 1).
        beta2: How slowly its wavering does, in [0, 1).

    Raises:
        UserError: A value is out of range, or the steps leave nothing between warm-up and end.
    """

    def __init__(
        self,
        deltas: Mapping[str, SnellDelta],
        target_sparsity: float,
        total_steps: int,
        warmup_steps: int = 0,
        final_steps: int = 0,
        interval: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        for name, value in (("target_sparsity", target_sparsity), ("beta1", beta1), ("beta2", beta2)):
            check_fraction(name, value)
        if interval < 1 or min(warmup_steps, final_steps) < 0 or warmup_steps + final_steps >= total_steps:
            raise UserError(
                f"a budget over {total_steps} steps with {warmup_steps} of warm-up, {final_steps} at the end and an "
                f"interval of {interval}; expected at least one step in between, and an interval of at least 1"
            )
        self.deltas = dict(deltas)
        self.total_steps, self.warmup_steps, self.final_steps = total_steps, warmup_steps, final_steps
        self.interval, self.beta1, self.beta2 = interval, beta1, beta2
        self.sizes = [delta.in_features * delta.out_features for delta in self.deltas.values()]
        parts = zip(self.deltas.values(), self.sizes, strict=True)
        self.initial = sum((1 - delta.sparsity) * size for delta, size in parts)
        self.target = (1 - target_sparsity) * sum(self.sizes)
        self._averages: dict[str, tuple[Tensor, Tensor]] = {}
        for delta, size in zip(self.deltas.values(), self.sizes, strict=True):
            delta.sparsity = max(delta.sparsity, _competing(size))

    @torch.no_grad()
    def accumulate(self) -> None:
        """Take the importance of each factor's entries, from their values and gradients as they are now."""
        for name, delta in self.deltas.items():
            for side in ("in_factors", "out_factors"):
                factors: Tensor = getattr(delta, side)
                if factors.grad is None:
                    continue
                # Under fp16 a step whose gradients overflow is left out by the scaler.
                now = (factors * factors.grad).abs().float().nan_to_num_(nan=0.0, posinf=0.0)
                key = f"{name}.{side}"
                if key not in self._averages:
                    self._averages[key] = torch.zeros_like(now), torch.zeros_like(now)
                importance, wavering = self._averages[key]
                importance.lerp_(now, 1 - self.beta1)
                wavering.lerp_((now - importance).abs_(), 1 - self.beta2)

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """How much each update matters, in [0, 1], 1 in the sum; all the same where none does."""
        sums = []
        for name in self.deltas:
            averages = [self._averages.get(f"{name}.{side}") for side in ("in_factors", "out_factors")]
            sums.append(sum(float((one * other).double().mean()) for one, other in filter(None, averages)))
        return dict(zip(self.deltas, _normalised(sums), strict=True))

    def budget(self, step: int) -> int:
        """Entries that survive in all, at a step."""
        between = self.total_steps - self.final_steps - self.warmup_steps
        progress = min(max((step - self.warmup_steps) / between, 0.0), 1.0)
        return math.floor(self.target + (self.initial - self.target) * (1 - progress) ** 3)

    def step(self, step: int) -> dict[str, float]:
        """Deal the budget out anew, where it is time to.

        Args:
            step: From 0 to `total_steps - 1`.

        Returns:
            The sparsity of each update from now on.
        """
        ending = step >= self.total_steps - self.final_steps
        if step > self.warmup_steps and (ending or (step - self.warmup_steps) % self.interval == 0):
            shares = allocate(self.budget(step), list(self.scores().values()), self.sizes)
            for delta, size, share in zip(self.deltas.values(), self.sizes, shares, strict=True):
                delta.sparsity = max(1 - max(share, 1) / size, _competing(size))
        return {name: delta.sparsity for name, delta in self.deltas.items()}

    def state_dict(self) -> dict[str, Any]:
        """The averages, and the sparsity of each update."""
        averages = {key: [each.clone() for each in pair] for key, pair in self._averages.items()}
        return {"averages": averages, "sparsity": {name: delta.sparsity for name, delta in self.deltas.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name, sparsity in state_dict["sparsity"].items():
            self.deltas[name].sparsity = sparsity
        for key, (importance, wavering) in state_dict["averages"].items():
            name, _, side = key.rpartition(".")
            device = getattr(self.deltas[name], side).device
            self._averages[key] = importance.to(device), wavering.to(device)


def allocate(budget: int, scores: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Deal a budget out in proportion to scores; what exceeds a size goes to the others, and nothing is lost.

    Args:
        budget: Entries in all; what is more than all sizes is not dealt out.
        scores: At least 0.
        sizes: The most that each can take, at least 1.

    Returns:
        What each gets, whole numbers whose sum is the budget; at least 1, if there are that many.
    """
    left = min(budget, sum(sizes))
    shares = [0] * len(sizes)
    if left >= len(sizes):
        shares, left = [1] * len(sizes), left - len(sizes)
    while left > 0:
        room = [place for place, size in enumerate(sizes) if shares[place] < size]
        weights = _normalised([scores[place] for place in room])
        wanted = [left * weight for weight in weights]
        given = [min(math.floor(want), sizes[place] - shares[place]) for place, want in zip(room, wanted, strict=True)]
        if not any(given):
            # Fewer entries than there are places: the largest remainders first.
            first = sorted(range(len(room)), key=lambda number: (-wanted[number], room[number]))[:left]
            given = [int(number in first) for number in range(len(room))]
        for place, count in zip(room, given, strict=True):
            shares[place] += count
        left -= sum(given)
    return shares


def _normalised(values: Sequence[float]) -> list[float]:
    """Divided by their sum; all the same where that is 0, or no number. What is no number counts 0."""
    finite = [value if math.isfinite(value) and value > 0 else 0.0 for value in values]
    largest = max(finite, default=0.0)
    if largest == 0:
        return [1 / len(finite)] * len(finite) if finite else []
    scaled = [value / largest for value in finite]
    total = math.fsum(scaled)
    return [value / total for value in scaled]


def _competing(size: int) -> float:
    """The sparsity at which the sparsifier is at work and one entry alone is dropped."""
    return 0.5 / size
