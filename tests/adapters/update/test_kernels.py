"""Kernels: their values by other means, and their closed-form gradients against numerical differentiation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from snell_lightning import UserError
from snell_lightning.adapters import SnellConfig, SnellDelta
from snell_lightning.adapters.layers.product import tuned_linear
from snell_lightning.adapters.update import competition
from snell_lightning.adapters.update.competition import SPARSIFIERS
from snell_lightning.adapters.update.kernels import KERNELS
from tests.adapters import reference

# Step of the central differences in double precision; their error is about 1e-10 for values and slopes near
# 1.
STEP = 1e-6


def make_delta(
    kernel: str = "distance", sparsifier: str = "none", sparsity: float = 0.5, **settings: float
) -> SnellDelta:
    """5 inputs, 4 outputs, rank 6 in 2 pieces, in double precision, with values of order 1."""
    config = SnellConfig(
        **{
            "rank": 6,
            "scale": 1.0,
            "kernel": kernel,
            "sparsifier": sparsifier,
            "sparsity": sparsity,
            **settings,
        }
    )
    delta = SnellDelta(5, 4, config, dtype=torch.float64)
    nn.init.normal_(delta.in_factors)
    nn.init.normal_(delta.out_factors)
    for name, value in {"alpha": 0.7, "gamma": 0.6, "beta": 0.1}.items():
        if hasattr(delta, name):
            nn.init.constant_(getattr(delta, name), value)
    return delta


def numerical_gradient(value: Callable[[], Tensor], at: Tensor) -> Tensor:
    """Central differences of a scalar with respect to each entry of a tensor that is changed in place."""
    gradient = torch.empty_like(at)
    flat, out = at.data.view(-1), gradient.view(-1)
    for index, entry in enumerate(flat.tolist()):
        flat[index] = entry + STEP
        above = value()
        flat[index] = entry - STEP
        out[index] = (above - value()) / (2 * STEP)
        flat[index] = entry
    return gradient.detach()


@pytest.mark.parametrize("sparsifier", ["none", "hard"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_is_the_derivative_of_the_update(kernel: str, sparsifier: str) -> None:
    delta = make_delta(kernel, sparsifier)

    assert torch.autograd.gradcheck(lambda *_: delta.weight(), tuple(delta.parameters()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sparsifier", ["none", "hard"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_is_the_derivative_of_the_tuned_product(kernel: str, sparsifier: str, bias: bool) -> None:
    delta = make_delta(kernel, sparsifier)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, dtype=torch.float64)
    offset = torch.randn(4, dtype=torch.float64) if bias else None

    assert torch.autograd.gradcheck(lambda x, *_: tuned_linear(x, weight, offset, [delta]), (x, *delta.parameters()))


# `magnitude` and `soft` hold |K| and the threshold constant: there the gradient is not the derivative of
# the update but that of a surrogate with those constants frozen at the point.
@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_is_the_derivative_with_the_sparsifier_constants_frozen(kernel: str, sparsifier: str) -> None:
    delta = make_delta(kernel, sparsifier)
    base = reference.kernel_matrix(delta).detach()
    grad = torch.randn(4, 5, dtype=torch.float64)

    torch.testing.assert_close(delta.weight(), reference.update(delta, frozen_at=base), rtol=1e-12, atol=1e-12)
    delta.weight().backward(grad)

    for factors in delta.parameters():
        expected = numerical_gradient(lambda: (grad * reference.update(delta, frozen_at=base)).sum(), factors)
        torch.testing.assert_close(factors.grad, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_of_the_tuned_product_has_the_sparsifier_constants_frozen(kernel: str, sparsifier: str) -> None:
    delta = make_delta(kernel, sparsifier)
    base = reference.kernel_matrix(delta).detach()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight, grad = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def surrogate() -> Tensor:
        return (grad * (x @ (weight + reference.update(delta, frozen_at=base)).T)).sum()

    tuned_linear(x, weight, None, [delta]).backward(grad)

    for tensor in (x, *delta.parameters()):
        expected = numerical_gradient(surrogate, tensor)
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-7, atol=1e-8)


def test_magnitude_gradient_is_not_the_plain_derivative() -> None:
    # The derivative of K|K| is 2|K|, the method's gradient |K|: half of it, for the linear kernel and every
    # factor.
    delta = make_delta("linear", "magnitude")
    delta.weight().sum().backward()

    derivative = numerical_gradient(lambda: delta.weight().sum(), delta.out_factors)

    torch.testing.assert_close(delta.out_factors.grad, derivative / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_linear_kernel_is_the_sum_of_the_pieces_products(pieces: int) -> None:
    delta = make_delta("linear", pieces=pieces)
    p, q = delta.out_factors, delta.in_factors

    assert p.shape == (pieces, 4, 6 // pieces)
    assert q.shape == (pieces, 5, 6 // pieces)
    torch.testing.assert_close(delta.weight(), sum(p[h] @ q[h].T for h in range(pieces)))


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_distance_kernel_is_the_alternating_sum_of_distances(pieces: int) -> None:
    delta = make_delta("distance", pieces=pieces, scale=0.3)
    p, q = delta.out_factors.tolist(), delta.in_factors.tolist()

    def entry(o: int, i: int) -> float:
        total = 0.0
        for h in range(pieces):
            squared = sum((a - b) ** 2 for a, b in zip(p[h][o], q[h][i], strict=True))
            total += 0.3 * (1 if h % 2 == 0 else -1) * squared**0.5
        return total

    expected = torch.tensor([[entry(o, i) for i in range(5)] for o in range(4)], dtype=torch.float64)
    torch.testing.assert_close(delta.weight(), expected, rtol=1e-12, atol=1e-12)


def test_coincident_points_have_distance_and_gradient_zero() -> None:
    delta = SnellDelta(1, 1, SnellConfig(rank=6, sparsifier="none"))
    delta.out_factors.data.copy_(delta.in_factors.data)

    update = delta.weight()
    update.backward(torch.ones_like(update))

    assert update.item() == 0
    assert torch.equal(delta.in_factors.grad, torch.zeros_like(delta.in_factors))
    assert torch.equal(delta.out_factors.grad, torch.zeros_like(delta.out_factors))


def test_one_coincident_pair_leaves_the_other_gradients_right() -> None:
    delta = make_delta()
    delta.out_factors.data[0, 1] = delta.in_factors.data[0, 2]
    grad = torch.randn(4, 5, dtype=torch.float64)

    found = torch.autograd.grad(delta.weight(), (delta.out_factors, delta.in_factors), grad)
    expected = torch.autograd.grad(reference.update(delta), (delta.out_factors, delta.in_factors), grad)

    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_close_points_far_from_the_origin_keep_their_digits() -> None:
    # Points at distance about 1 from each other and 170 from the origin. In fp32 the expansion |p|^2 +
    # |q|^2 - 2 p.q has terms of 3e4 with a spacing of 2e-3; differences of the coordinates are exact.
    delta = SnellDelta(5, 4, SnellConfig(rank=6, pieces=1, sparsifier="none", scale=1.0))
    for factors in (delta.in_factors, delta.out_factors):
        nn.init.normal_(factors, mean=70)
    double = SnellDelta(5, 4, delta.config, dtype=torch.float64)
    double.load_state_dict(delta.state_dict())
    expansion = torch.cdist(delta.out_factors[0], delta.in_factors[0], compute_mode="use_mm_for_euclid_dist").double()

    assert (delta.weight() - double.weight()).abs().max() < 1e-6
    assert (expansion - double.weight()).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_low_precision_factors_are_computed_in_fp32(kernel: str, dtype: torch.dtype) -> None:
    config = SnellConfig(rank=6, kernel=kernel, sparsity=0.5)
    low, full = SnellDelta(32, 24, config, dtype=dtype), SnellDelta(32, 24, config)
    full.load_state_dict(low.state_dict())
    grad = torch.randn(24, 32)

    update = low.weight()
    update.backward(grad)
    full.weight().backward(grad)

    assert update.dtype == torch.float32
    assert torch.equal(update, full.weight())
    assert low.in_factors.grad.dtype == dtype
    assert torch.equal(low.in_factors.grad, full.in_factors.grad.to(dtype))
    assert torch.equal(low.out_factors.grad, full.out_factors.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_does_not_change_the_update(kernel: str, dtype: torch.dtype) -> None:
    delta = SnellDelta(32, 24, SnellConfig(rank=6, kernel=kernel))
    expected = delta.weight()

    with torch.autocast("cpu", dtype=dtype):
        found = delta.weight()

    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_reduced_product_precision_does_not_change_the_update(kernel: str, precision: str) -> None:
    delta = SnellDelta(64, 48, SnellConfig(rank=16, kernel=kernel))
    grad = torch.randn(48, 64)
    expected = delta.weight()
    expected_grads = torch.autograd.grad(expected, (delta.out_factors, delta.in_factors), grad)

    torch.set_float32_matmul_precision(precision)
    found = delta.weight()
    found_grads = torch.autograd.grad(found, (delta.out_factors, delta.in_factors), grad)

    assert torch.get_float32_matmul_precision() == precision
    assert torch.equal(found, expected)
    for found_grad, expected_grad in zip(found_grads, expected_grads, strict=True):
        assert torch.equal(found_grad, expected_grad)


@pytest.mark.parametrize("features", [(5, 300), (300, 5)])
def test_factors_start_uniform_within_the_kaiming_bound(features: tuple[int, int]) -> None:
    # Kaiming-uniform with a = sqrt(5) over a tensor (pieces, n, columns) is uniform within 1 / sqrt(n *
    # columns).
    delta = SnellDelta(*features, SnellConfig(rank=64, pieces=2))

    for factors, size in zip((delta.in_factors, delta.out_factors), features, strict=True):
        bound = (size * 32) ** -0.5
        assert factors.abs().max() <= bound
        assert factors.abs().max() > 0.95 * bound
        # A uniform variable on [-b, b] has the standard deviation b / sqrt(3); 320 draws or more give it
        # within 10 %.
        assert factors.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_the_mixture_is_the_same_in_tiles_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its softmax goes over all rows, of which a tile has some."""
    delta = make_delta("mixture", "magnitude")
    grad = torch.randn(4, 5, dtype=torch.float64)
    whole = delta.weight()
    expected = torch.autograd.grad(whole, tuple(delta.parameters()), grad)
    monkeypatch.setattr(competition, "_TILE_ON_CPU", 5)
    tiled = delta.weight()
    found = torch.autograd.grad(tiled, tuple(delta.parameters()), grad)
    torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_the_mixture_of_several_slices_gives_each_its_own_scalars() -> None:
    deltas = [make_delta("mixture", "magnitude") for _ in range(3)]
    nn.init.constant_(deltas[1].alpha, -0.4)
    x = torch.randn(3, 5, dtype=torch.float64)
    weight, grad = torch.randn(12, 5, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    tuned_linear(x, weight, None, deltas).backward(grad)
    for number, delta in enumerate(deltas):
        rows = slice(4 * number, 4 * number + 4)
        expected = torch.autograd.grad(delta.weight(), tuple(delta.parameters()), grad[:, rows].T @ x)
        for parameter, each in zip(delta.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, each, rtol=1e-10, atol=1e-12)


def test_the_mixture_starts_where_the_paper_starts_it_and_not_at_zero() -> None:
    delta = SnellDelta(5, 4, SnellConfig(rank=6, kernel="mixture"))
    assert [getattr(delta, name).tolist() for name in ("alpha", "gamma", "beta")] == [[1.0], [1.0], [0.0]]
    assert delta.adapter_params() == ["in_factors", "out_factors", "alpha", "gamma", "beta"]
    assert delta.scale == 0.1
    with pytest.raises(UserError, match="start zero cannot be under the kernel mixture"):
        SnellConfig(kernel="mixture", start="zero")
