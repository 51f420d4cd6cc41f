"""How an update starts: `random` as published, or exactly at zero and able to leave it."""

import pytest
import torch
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellDelta, SnellLinear, UserError, compiled

SHAPES = [(5, 7), (64, 200), (512, 768)]
ZERO = {"rank": 8, "start": "zero", "scale": 1.0}


@pytest.fixture(params=["compiled", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The loop of the CPU, and torch's operations."""
    if request.param == "torch":
        monkeypatch.setattr(compiled, "applies", lambda *_: False)
    return request.param


def stepped(layer: SnellLinear, x: Tensor, rate: float = 0.01) -> None:
    """One step of Adam on a loss of the layer's output."""
    optimizer = torch.optim.Adam(layer.deltas.parameters(), lr=rate)
    (layer(x) - 1).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [{}, {"pieces": 4}, {"kernel": "linear"}, {"sparsifier": "none"}])
def test_a_zero_start_is_exactly_zero(engine: str, shape: tuple[int, int], settings: dict[str, object]) -> None:
    delta = SnellDelta(shape[1], shape[0], SnellConfig(**{"sparsifier": "hard", **ZERO, **settings}))

    assert not delta.weight().any()
    assert delta.in_factors.std() > 0


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("settings", [{}, {"pieces": 4}, {"kernel": "linear"}])
def test_the_first_gradient_is_that_of_the_dense_update(
    engine: str, sparsity: float, settings: dict[str, object]
) -> None:
    torch.manual_seed(0)
    delta = SnellDelta(150, 130, SnellConfig(sparsity=sparsity, **{"sparsifier": "hard", **ZERO, **settings}))
    dense = SnellDelta(150, 130, SnellConfig(**{"sparsifier": "none", **ZERO, **settings}))
    dense.load_state_dict(delta.state_dict())
    grad = torch.randn(130, 150)

    delta.weight().backward(grad)
    dense.weight().backward(grad)

    for ours, theirs in zip(delta.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert delta.out_factors.grad is not None
    assert delta.out_factors.grad.all()


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_after_a_step_the_largest_entries_survive(engine: str, sparsity: float) -> None:
    torch.manual_seed(0)
    layer = SnellLinear(nn.Linear(200, 64), SnellConfig(sparsity=sparsity, sparsifier="hard", **ZERO))
    x = torch.randn(40, 200)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))

    stepped(layer, x)
    update = layer.deltas[0].weight()

    assert (update == 0).sum().item() == int(sparsity * (update.numel() - 1)) + 1
    stepped(layer, x)
    assert layer.deltas[0].weight().isfinite().all()


def test_pieces_that_start_equal_go_apart() -> None:
    torch.manual_seed(0)
    layer = SnellLinear(nn.Linear(50, 40), SnellConfig(sparsifier="hard", **ZERO))
    (delta,) = layer.deltas
    assert torch.equal(delta.in_factors[0], delta.in_factors[1])

    for _ in range(20):
        stepped(layer, torch.randn(30, 50))

    assert (delta.out_factors[0] - delta.out_factors[1]).abs().min() > 0


def test_a_random_start_draws_what_is_published() -> None:
    torch.manual_seed(0)
    delta = SnellDelta(200, 100, SnellConfig(rank=8))
    torch.manual_seed(0)
    expected = nn.init.kaiming_uniform_(torch.empty(2, 200, 4), a=5**0.5)

    assert torch.equal(delta.in_factors, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsifier": "magnitude"}, "start zero has no gradient under the sparsifier magnitude.*hard or none"),
        ({"sparsifier": "soft"}, "start zero has no gradient under the sparsifier soft"),
        ({"sparsifier": "hard", "pieces": 1}, "start zero needs an even number of pieces.*not 1"),
        ({"sparsifier": "hard", "start": "zeros"}, "start must be one of random, zero, not 'zeros'; did you mean zero"),
    ],
)
def test_a_zero_start_that_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SnellConfig(**{**ZERO, **settings})
