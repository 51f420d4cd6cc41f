"""Rounding to bf16 at random, and tuned layers whose product is one with it."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from snell_lightning.adapters import SnellConfig, SnellLinear, UserError
from snell_lightning.adapters.update.rounding import round_at_random


def test_a_number_becomes_either_neighbour_and_stays_on_average() -> None:
    matrix = torch.randn(30, 50) * torch.logspace(-20, 20, 50)
    spacing = 2.0 ** (torch.floor(torch.log2(matrix.abs())) - 7)

    drawn = torch.stack([round_at_random(matrix, seed).float() for seed in range(256)])

    assert ((drawn - matrix).abs() < spacing).all()
    assert max(len(values.unique()) for values in drawn.flatten(1).T[:99]) == 2
    assert (((drawn.mean(0) - matrix) / spacing).abs() < 5 * 0.5 / 16).all()
    assert torch.equal(round_at_random(matrix, 3), round_at_random(matrix, 3))


def test_what_bf16_holds_stays_as_it_is() -> None:
    held = torch.tensor([[0.0, -0.0, 1.0, -3.5, float("inf"), float("-inf"), 2.0**-126]])

    assert torch.equal(round_at_random(held, 0).float(), held)
    assert round_at_random(torch.tensor([[torch.nan]]), 0).isnan().all()


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.split("::")[-1] in ("mm", "addmm", "addmm_")
        return func(*args, **(kwargs or {}))


def make_layer(rounding: str, **settings: object) -> SnellLinear:
    torch.manual_seed(0)
    config = SnellConfig(rank=4, sparsity=0.5, start="random", scale=0.02, rounding=rounding, **settings)
    return SnellLinear(nn.Linear(32, 48), config)


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_a_bf16_layer_has_one_product_whose_mean_is_that_of_two(drop_path: float) -> None:
    one, two = make_layer("random"), make_layer("apart")
    x = torch.randn(64, 32).bfloat16()
    with Products() as of_one:
        one(x)
    with Products() as of_two:
        two(x)

    with torch.no_grad():
        mean = torch.stack([one(x).float() for _ in range(400)]).mean(0)
        exact = x.float() @ (two.weight + two.whole_update()).T + two.bias

    assert (of_one.count, of_two.count) == (1, 2)
    # Far below the update's own part: it is not lost, though it is below half of a weight's spacing.
    part = (x.float() @ two.whole_update().T).norm()
    assert (mean - exact).norm() < 0.35 * part
    one.config.drop_path = drop_path
    one(x.requires_grad_()).float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in one.deltas.parameters())


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_gradients_are_those_of_two_products(drop_path: float) -> None:
    found = []
    for rounding in ("random", "apart"):
        layer = make_layer(rounding, drop_path=drop_path)
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        torch.manual_seed(2)
        y = layer(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16())
        found.append([x.grad, *(parameter.grad for parameter in layer.deltas.parameters())])

    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_fp32_products_and_evaluation_are_not_rounded() -> None:
    one, two = make_layer("random"), make_layer("apart")
    x = torch.randn(8, 32)

    assert torch.equal(one(x), two(x))
    one.eval(), two.eval()
    with torch.no_grad():
        assert torch.equal(one(x.bfloat16()), two(x.bfloat16()))


def test_an_unknown_way_of_rounding_is_refused() -> None:
    with pytest.raises(UserError, match="rounding must be one of apart, random, not 'nearest'"):
        SnellConfig(rounding="nearest")


def test_a_compiled_layer_rounds_anew_each_time() -> None:
    torch._dynamo.reset()
    layer = make_layer("random")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x: Tensor = torch.randn(8, 32).bfloat16()

    assert not torch.equal(compiled(x), compiled(x))
