"""The budget between layers: the released implementation's shares, and that no scores lose budget or loop for ever."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snell_lightning import SnellConfig, UserError
from snell_lightning.adapters import SnellDelta
from snell_lightning.adapters.budget import BudgetAllocator, allocate

ARRAYS = np.load(Path(__file__).parents[1] / "golden" / "budget.npz")
ENTRIES = 16 * 32


def two_layers(sparsity: float = 0.2) -> dict[str, SnellDelta]:
    config = SnellConfig(rank=4, pieces=2, sparsity=sparsity, sparsifier="magnitude")
    return {"a": SnellDelta(16, 32, config), "b": SnellDelta(32, 16, config)}


def take(deltas: dict[str, SnellDelta], epoch: int, step: int) -> None:
    for name, delta in deltas.items():
        for side in ("in_factors", "out_factors"):
            values, grads = (ARRAYS[f"epoch{epoch}.step{step}.{name}.{side}.{kind}"] for kind in ("value", "grad"))
            factors = getattr(delta, side)
            factors.data, factors.grad = torch.from_numpy(values.copy()), torch.from_numpy(grads.copy())


def test_shares_are_those_of_the_released_implementation() -> None:
    deltas = two_layers()
    allocator = BudgetAllocator(deltas, target_sparsity=0.7, total_steps=8, final_steps=1)
    for epoch, expected in enumerate(ARRAYS["sparsity"]):
        found = allocator.step(epoch)
        assert list(found.values()) == [delta.sparsity for delta in deltas.values()]
        # To two entries of a layer: what the floors of all shares leave over is dealt out here.
        assert np.abs(np.array(list(found.values())) - expected).max() <= 2 / ENTRIES
        for step in range(2):
            take(deltas, epoch, step)
            allocator.accumulate()


def test_what_was_saved_goes_on_the_same() -> None:
    ends = []
    for stop in (None, 3):
        deltas = two_layers()
        allocator = BudgetAllocator(deltas, 0.7, 8, 0, 1)
        for epoch in range(8):
            if epoch == stop:
                state, deltas = allocator.state_dict(), two_layers()
                allocator = BudgetAllocator(deltas, 0.7, 8, 0, 1)
                allocator.load_state_dict(state)
            allocator.step(epoch)
            take(deltas, epoch, 0)
            allocator.accumulate()
        ends.append(allocator.state_dict())
    assert ends[0]["sparsity"] == ends[1]["sparsity"]
    for key, pair in ends[0]["averages"].items():
        assert all(torch.equal(one, other) for one, other in zip(pair, ends[1]["averages"][key], strict=True))


def test_warm_up_end_and_interval() -> None:
    deltas = two_layers(0.0)
    allocator = BudgetAllocator(deltas, 0.9, total_steps=20, warmup_steps=4, final_steps=5, interval=3)
    budgets = [allocator.budget(step) for step in range(20)]
    assert budgets[:5] == [2 * ENTRIES] * 5
    assert budgets[15:] == [math.floor(0.1 * 2 * ENTRIES)] * 5
    assert all(before > after for before, after in pairwise(budgets[4:16]))
    changed = []
    for step in range(20):
        before = [delta.sparsity for delta in deltas.values()]
        allocator.step(step)
        if before != [delta.sparsity for delta in deltas.values()]:
            changed.append(step)
    assert changed == [7, 10, 13, 15]


def test_an_update_with_all_its_entries_keeps_its_sparsifier() -> None:
    deltas = two_layers(0.0)
    BudgetAllocator(deltas, 0.5, 10)
    for delta in deltas.values():
        assert not delta.rule.dense
        assert int((delta.weight() == 0).sum()) == 1


def test_survivors_are_as_many_as_the_shares() -> None:
    deltas = two_layers(0.0)
    allocator = BudgetAllocator(deltas, 0.63, 4, final_steps=1)
    take(deltas, 0, 0)
    allocator.accumulate()
    allocator.step(3)
    survivors = [int((delta.weight() != 0).sum()) for delta in deltas.values()]
    assert sum(survivors) == allocator.budget(3) == math.floor(0.37 * 2 * ENTRIES)


def test_gradients_that_are_no_numbers_count_nothing() -> None:
    deltas = two_layers()
    allocator = BudgetAllocator(deltas, 0.7, 8)
    take(deltas, 0, 0)
    deltas["a"].in_factors.grad[:] = math.nan
    deltas["a"].out_factors.grad[:] = -math.inf
    allocator.accumulate()
    assert allocator.scores() == {"a": 0.0, "b": 1.0}


scores = st.one_of(st.floats(0, 1e30), st.sampled_from([0.0, math.nan, math.inf, 1e-300]))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(scores, st.integers(1, 10**7)), min_size=1, max_size=40), st.floats(0, 1))
def test_no_budget_is_lost_and_none_exceeds_its_size(layers: list[tuple[float, int]], part: float) -> None:
    each, sizes = [score for score, _ in layers], [size for _, size in layers]
    budget = math.floor(part * sum(sizes))
    shares = allocate(budget, each, sizes)
    assert sum(shares) == budget
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    if budget >= len(sizes):
        assert min(shares) >= 1


@pytest.mark.parametrize(
    ("scores", "sizes", "budget", "expected"),
    [
        ([0.0, 0.0], [100, 100], 50, [25, 25]),
        ([1.0, 0.0], [100, 100], 50, [49, 1]),
        # What exceeds the first's size goes to the others by their scores.
        ([8.0, 1.0, 1.0], [10, 100, 100], 100, [10, 45, 45]),
        ([3.0, 1.0], [100, 100], 1, [1, 0]),
        ([1.0, 1.0], [10, 10], 99, [10, 10]),
    ],
)
def test_shares(scores: list[float], sizes: list[int], budget: int, expected: list[int]) -> None:
    assert allocate(budget, scores, sizes) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_sparsity": 1.0}, "target_sparsity must be at least 0 and below 1"),
        ({"beta1": 1.0}, "beta1 must be"),
        ({"warmup_steps": 5, "final_steps": 5}, "expected at least one step in between"),
        ({"interval": 0}, "interval of at least 1"),
    ],
)
def test_each_mistake_is_one_line(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BudgetAllocator(two_layers(), **{"target_sparsity": 0.5, "total_steps": 10, **settings})
