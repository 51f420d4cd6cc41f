"""Competition: which entries survive, and with what value."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellDelta, UserError
from snell_lightning.adapters.update.competition import (
    SPARSIFIERS,
    TIED,
    shrink_,
    survivor_slopes,
    survivor_values_,
    threshold,
)
from snell_lightning.memory import StorageTracker
from tests.adapters import reference

COMPETING = [name for name in SPARSIFIERS if name != "none"]


def survivors(matrix: Tensor, tau: Tensor, sparsifier: str) -> Tensor:
    return survivor_values_(shrink_(matrix.clone(), tau), tau, sparsifier, torch.empty_like(matrix))


def slopes(matrix: Tensor, tau: Tensor, sparsifier: str) -> Tensor:
    return survivor_slopes(shrink_(matrix.clone(), tau), tau, sparsifier, torch.empty_like(matrix))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 1), (1, 5), (7, 1), (10, 10), (101, 1), (56, 32), (1000, 33)])
def test_survivors_are_those_above_the_interpolated_quantile(shape: tuple[int, int], sparsity: float) -> None:
    matrix = torch.randn(shape)

    kept = matrix.abs() > threshold(matrix, sparsity)

    expected = matrix.abs().double() > np.quantile(matrix.abs().double().numpy(), sparsity)
    assert torch.equal(kept, expected)


def test_half_of_five_entries_leaves_two() -> None:
    # k = floor(0.5 * 4) + 1 = 3: the third smallest absolute value loses with all below it.
    matrix = torch.tensor([[5.0, -1.0, 4.0, 2.0, -3.0]])

    tau = threshold(matrix, 0.5)

    assert tau.item() == 3
    assert tau.shape == ()
    assert survivors(matrix, tau, "hard").tolist() == [[5, 0, 4, 0, 0]]
    assert survivors(matrix, tau, "magnitude").tolist() == [[25, 0, 16, 0, 0]]
    assert survivors(matrix, tau, "soft").tolist() == [[5 * (5 - 3), 0, 4 * (4 - 3), 0, 0]]
    assert slopes(matrix, tau, "hard").tolist() == [[1, 0, 1, 0, 0]]
    assert slopes(matrix, tau, "magnitude").tolist() == [[5, 0, 4, 0, 0]]
    assert slopes(matrix, tau, "soft").tolist() == [[2 * 5 - 3, 0, 2 * 4 - 3, 0, 0]]


@pytest.mark.parametrize("sparsifier", COMPETING)
def test_survivors_keep_their_sign(sparsifier: str) -> None:
    matrix = torch.randn(20, 30)

    kept = survivors(matrix, threshold(matrix, 0.8), sparsifier)

    assert (kept != 0).sum() == 120  # 600 entries, k = floor(0.8 * 599) + 1 = 480 lose
    assert torch.equal(kept.sign()[kept != 0], matrix.sign()[kept != 0])


def test_entries_tied_with_the_threshold_all_lose() -> None:
    # Absolute values 1, 1, 2, 2, 2, 3: k = floor(0.5 * 5) + 1 = 3, tau = 2, and all three 2 lose.
    matrix = torch.tensor([1.0, -1.0, 2.0, -2.0, 2.0, 3.0])

    tau = threshold(matrix, 0.5)

    assert tau.item() == 2
    assert survivors(matrix, tau, "hard").tolist() == [0, 0, 0, 0, 0, 3]


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("sparsifier", COMPETING)
def test_a_matrix_of_equal_entries_has_no_survivor(sparsifier: str, value: float) -> None:
    matrix = torch.full((6, 4), value)

    assert not survivors(matrix, threshold(matrix, 0.5), sparsifier).any()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_threshold_with_many_ties_is_an_order_statistic(sparsity: float) -> None:
    matrix = torch.randint(-4, 5, (40, 50)).float()

    rank = int(sparsity * 1999) + 1

    expected = matrix.abs().flatten().sort().values[rank - 1].item()
    assert threshold(matrix, sparsity).item() == (expected or TIED)


@pytest.mark.parametrize(("sparsifier", "expected"), [("hard", 1.0), ("magnitude", 0.0), ("soft", 0.0)])
def test_of_entries_tied_at_zero_none_loses(sparsifier: str, expected: float) -> None:
    # Absolute values 0, 0, 0, 2: k = floor(0.5 * 3) + 1 = 2 is a 0. `magnitude` and `soft` are flat there.
    matrix = torch.tensor([0.0, -2.0, 0.0, 0.0])
    tau = threshold(matrix, 0.5)

    assert slopes(matrix, tau, sparsifier)[[0, 2, 3]].tolist() == pytest.approx([expected] * 3, abs=1e-30)
    assert survivors(matrix, tau, sparsifier)[[0, 2, 3]].tolist() == [0.0] * 3


def test_threshold_is_exact_beyond_the_size_that_quantile_takes() -> None:
    # torch.quantile refuses more than 2^24 elements. A shuffled range has a known order statistic: the k-th
    # smallest of 0, 1, 2, ... is k - 1, and fp32 holds every integer up to 2^24.
    size = 2**24 + 1
    matrix = torch.randperm(size, dtype=torch.int32).float().neg_()

    assert threshold(matrix, 0.9).item() == int(0.9 * (size - 1))


@pytest.mark.parametrize("sparsity", [1e-6, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999, 1 - 1e-7])
@pytest.mark.parametrize("shape", [(3072, 768), (768, 3072), (769, 1001), (200_003, 1), (1, 200_003)])
def test_a_large_matrixs_threshold_is_the_order_statistic(shape: tuple[int, int], sparsity: float) -> None:
    matrix = torch.randn(shape)
    rank = int(sparsity * (matrix.numel() - 1)) + 1

    expected = matrix.abs().flatten().sort().values[rank - 1].item()
    assert threshold(matrix, sparsity).item() == (expected or TIED)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["columns", "rows", "ties", "zeros", "infinite"])
def test_the_threshold_is_exact_where_a_sample_says_little(kind: str, sparsity: float) -> None:
    matrix = torch.randn(512, 768)
    if kind == "columns":
        matrix *= torch.logspace(-3, 3, 768)
    elif kind == "rows":
        matrix = matrix.flatten().sort().values.view(512, 768)
    elif kind == "ties":
        matrix = matrix.round()
    elif kind == "zeros":
        matrix[torch.rand_like(matrix) < 0.95] = 0
    else:
        matrix[::3] = float("inf")
    rank = int(sparsity * (matrix.numel() - 1)) + 1

    expected = matrix.abs().flatten().sort().values[rank - 1].item()
    assert threshold(matrix, sparsity).item() == (expected or TIED)


def test_a_large_matrix_of_equal_entries_is_not_copied() -> None:
    matrix = torch.zeros(512, 768)
    with StorageTracker(matrix) as tracker, tracker.phase("selection"):
        tau = threshold(matrix, 0.9)

    assert tau.item() == TIED
    # Beyond the matrix: the sample, a tile of magnitudes and masks.
    assert tracker.phases["selection"].peak < 1.5 * 4 * matrix.numel() + 4 * 2**18
    matrix[:] = 3.0
    assert threshold(matrix, 0.9).item() == 3.0


def test_the_threshold_is_exact_where_the_sample_misleads() -> None:
    # The sample takes every 17th entry of these, and those are all larger than the others.
    matrix = torch.rand(2**9 + 1, 2**9)
    step = matrix.numel() // 2**14 + 1
    assert step == 17
    matrix.view(-1)[::step] += 10
    rank = int(0.5 * (matrix.numel() - 1)) + 1

    assert threshold(matrix, 0.5).item() == matrix.flatten().sort().values[rank - 1].item()


@pytest.mark.parametrize("kernel", ["distance", "linear"])
def test_sparsity_zero_and_none_are_the_dense_kernel(kernel: str) -> None:
    for settings in ({"sparsity": 0.0}, {"sparsity": 0.9, "sparsifier": "none"}):
        delta = SnellDelta(32, 24, SnellConfig(rank=6, kernel=kernel, **settings))
        torch.testing.assert_close(delta.weight(), reference.kernel_matrix(delta), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("sparsifier", COMPETING)
def test_the_competing_set_is_made_anew_from_the_factors(sparsifier: str) -> None:
    delta = SnellDelta(32, 24, SnellConfig(rank=6, sparsity=0.5, sparsifier=sparsifier, start="random"))
    before = delta.weight() != 0
    nn.init.normal_(delta.in_factors)

    after = delta.weight() != 0

    # 768 entries: k = floor(0.5 * 767) + 1 = 384 lose.
    assert before.sum() == after.sum() == 384
    assert not torch.equal(before, after)


def test_the_sparsity_may_be_set_while_training() -> None:
    delta = SnellDelta(32, 24, SnellConfig(rank=6, sparsity=0.5, start="random"))

    delta.sparsity = 0.9

    assert delta.sparsity == 0.9
    assert (delta.weight() == 0).sum() == 691  # floor(0.9 * 767) + 1
    assert delta.config.sparsity == 0.5


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    delta = SnellDelta(32, 24, SnellConfig(rank=6, sparsity=0.5))

    with pytest.raises(UserError, match="sparsity must be at least 0 and below 1"):
        delta.sparsity = sparsity

    assert delta.sparsity == 0.5


def test_magnitude_starts_nearly_at_the_pretrained_model() -> None:
    # With scale 0.1 and a layer of ViT-B's size, initial entries of K are below 1e-2, so K|K| is below
    # 1e-4, against backbone weights of about 2e-2.
    hard = SnellDelta(768, 768, SnellConfig(rank=8, sparsifier="hard", scale=0.1, start="random"))
    magnitude = SnellDelta(768, 768, SnellConfig(rank=8, sparsifier="magnitude", scale=0.1))

    assert 1e-4 < hard.weight().abs().max() < 1e-2
    assert 0 < magnitude.weight().abs().max() < 1e-4
