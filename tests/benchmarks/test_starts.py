"""The start that takes the initial kernel off, with which the default one is compared."""

import torch
from torch import nn

from benchmarks.starts import Subtracted, subtract
from snell_lightning.adapters import SnellConfig, SnellDelta, SnellLinear
from tests.adapters.reference import kernel_matrix


def test_the_update_is_the_difference_of_two_kernels() -> None:
    torch.manual_seed(0)
    plain = SnellDelta(30, 20, SnellConfig(rank=8, sparsity=0.0, start="random"))
    before = kernel_matrix(plain).detach()
    delta = Subtracted(plain)
    assert delta.weight().abs().max() < 1e-6 * before.abs().max()

    with torch.no_grad():
        delta.p.add_(0.1 * torch.randn_like(delta.p))
    after = kernel_matrix(plain)

    torch.testing.assert_close(delta.weight(), after - before, rtol=1e-4, atol=1e-6)
    (of_p,) = torch.autograd.grad(delta.weight().square().sum(), delta.p)
    (expected,) = torch.autograd.grad((after - before).square().sum(), plain.out_factors)
    torch.testing.assert_close(of_p, expected, rtol=1e-3, atol=1e-6)


def test_a_sparse_one_leaves_its_start() -> None:
    torch.manual_seed(0)
    layer = SnellLinear(nn.Linear(40, 30), SnellConfig(rank=8, start="random"))
    model = nn.Sequential(layer)
    subtract(model)
    optimizer = torch.optim.Adam(layer.deltas.parameters(), lr=0.01)
    x = torch.randn(16, 40)
    torch.testing.assert_close(model(x), nn.functional.linear(x, layer.weight, layer.bias))

    (model(x) - 1).square().mean().backward()
    optimizer.step()

    assert 0 < (layer.deltas[0].weight() != 0).float().mean() <= 0.1
    assert {name.split(".")[-1] for name, value in layer.named_parameters() if value.requires_grad} == {"p", "q"}
