"""The plain reading of the method gives the numbers of `SnellLinear`."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.straightforward import StraightforwardLinear
from snell_lightning.adapters import SnellConfig, SnellLinear


def make_pair(slices: int = 1, sparsity: float = 0.9, **noise: float) -> tuple[SnellLinear, StraightforwardLinear]:
    """A layer of 40 inputs and 48 outputs both ways, with the same updates, which are as large as its weights."""
    linear = nn.Linear(40, 48)
    layer = SnellLinear(
        copy.deepcopy(linear), SnellConfig(rank=8, sparsity=sparsity, scale=1.0, sparsifier="magnitude"), slices
    )
    for factors in layer.deltas.parameters():
        nn.init.normal_(factors)
    plain = StraightforwardLinear(linear, 8, sparsity, slices, scale=1.0, **{"dropout": 0.0, **noise})
    plain.copy_factors(layer)
    return layer, plain


def factor_gradients(module: nn.Module, factors: list[Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients of the input and of the factors."""
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(module(x), [x, *factors], grad))


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("slices", [1, 3])
def test_values_and_gradients_are_those_of_the_tuned_layer(slices: int, sparsity: float) -> None:
    layer, plain = make_pair(slices, sparsity)
    x, grad = torch.randn(2, 7, 40), torch.randn(2, 7, 48)

    expected, found = layer(x), plain(x)

    assert (expected - F.linear(x, layer.weight, layer.bias)).abs().max() > 1  # The updates have a say.
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    deltas = layer.updates
    pairs = zip(
        factor_gradients(layer, [f for d in deltas for f in (d.out_factors, d.in_factors)], x, grad),
        factor_gradients(
            plain, [f for pair in zip(plain.out_factors, plain.in_factors, strict=True) for f in pair], x, grad
        ),
        strict=True,
    )
    for one, other in pairs:
        assert (other - one).abs().max() < 1e-5 * one.abs().max()


def test_its_initial_factors_are_drawn_as_those_of_a_snell_layer() -> None:
    plain = StraightforwardLinear(nn.Linear(30, 48), rank=8, slices=3)

    # Uniform within 1 / sqrt(features * rank / pieces): of 120 entries and more, the largest is near the bound.
    for factors, features in [(plain.in_factors, 30), (plain.out_factors, 16)]:
        for factor in factors:
            assert factor.shape == (2, features, 4)
            assert 0.9 < factor.abs().max() * (features * 4) ** 0.5 <= 1


def test_noise_acts_in_training_and_only_on_the_update() -> None:
    _, plain = make_pair(dropout=0.5, drop_path=0.5)
    x = torch.randn(64, 3, 40)
    product = F.linear(x, plain.weight, plain.bias)

    update = plain(x) - product
    dropped = update.abs().amax((1, 2)) == 0

    assert 10 < dropped.sum() < 54  # Of 64 samples, each lost with probability 0.5.
    assert torch.equal(plain.eval()(x), plain(x))


def test_neither_kernel_nor_update_is_kept_for_backward() -> None:
    _, plain = make_pair(dropout=0.1)
    x = torch.randn(4, 40, requires_grad=True)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        plain(x)

    weight = plain.weight
    others = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()]
    assert others
    assert max(tensor.numel() for tensor in others) < weight.numel()
