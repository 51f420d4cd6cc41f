"""How an update starts: `random` as published, or exactly at zero and able to leave it."""

import pytest
import timm
import torch
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellDelta, SnellLinear, UserError, deltas, inject
from snell_lightning.adapters.update import loop

SHAPES = [(5, 7), (64, 200), (512, 768)]
ZERO = {"rank": 8, "start": "zero", "scale": 1.0}


@pytest.fixture(params=["compiled", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The loop of the CPU, and torch's operations."""
    if request.param == "torch":
        monkeypatch.setattr(loop, "applies", lambda *_: False)
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
    delta = SnellDelta(200, 100, SnellConfig(rank=8, start="random"))
    torch.manual_seed(0)
    expected = nn.init.kaiming_uniform_(torch.empty(2, 200, 4), a=5**0.5)

    assert torch.equal(delta.in_factors, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsifier": "magnitude"}, "start zero has no gradient under the sparsifier magnitude.*hard or none"),
        ({"sparsifier": "soft"}, "start zero has no gradient under the sparsifier soft"),
        ({"sparsifier": "hard", "pieces": 1}, "start zero needs an even number of pieces.*not 1"),
        (
            {"sparsifier": "hard", "start": "zeros"},
            "start must be one of auto, zero, random, not 'zeros'; did you mean zero",
        ),
    ],
)
def test_a_zero_start_that_cannot_be_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SnellConfig(**{**ZERO, **settings})


@pytest.mark.parametrize(
    ("settings", "zero"),
    [
        ({}, True),
        ({"sparsifier": "none"}, True),
        ({"kernel": "linear", "pieces": 1, "rank": 3}, True),
        ({"sparsifier": "magnitude"}, False),
        ({"sparsifier": "soft"}, False),
        ({"pieces": 1}, False),
        ({"start": "random"}, False),
    ],
)
def test_by_default_an_update_starts_at_zero_where_that_can_be(settings: dict[str, object], zero: bool) -> None:
    delta = SnellDelta(40, 30, SnellConfig(**{"rank": 8, **settings}))

    assert delta.config.starts_at_zero == zero
    assert bool(delta.weight().any()) != zero


def test_the_automatic_scale_depends_on_width_rank_density_and_the_number_of_layers() -> None:
    def scale(width: int, rank: int, sparsity: float, layers: int) -> float:
        return SnellDelta(width, 30, SnellConfig(rank=rank, sparsity=sparsity), layers=layers).scale

    usual = scale(384, 8, 0.9, 48)

    assert usual == pytest.approx(0.1, rel=0.01)
    assert scale(96, 8, 0.9, 48) == pytest.approx(4 * usual)
    halves = [scale(384, 32, 0.9, 48), scale(384, 8, 0.6, 48), scale(384, 8, 0.9, 192)]
    assert halves == pytest.approx([usual / 2] * 3)


def test_every_layer_that_is_adapted_counts_for_the_scale() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))

    inject(model, SnellConfig(rank=4, targets=["."], exclude=["3"]))

    assert [layer.deltas[0].scale for layer in model[:3]] == [
        SnellDelta(32, 8, SnellConfig(rank=4), layers=3).scale
    ] * 3


def test_projections_to_attentions_values_have_an_eighth_of_the_scale() -> None:
    model = timm.create_model("test_vit", num_classes=3)

    inject(model, SnellConfig(rank=4))

    q, k, v = (delta.scale for delta in model.blocks[0].attn.qkv.deltas)
    assert q == k == model.blocks[0].attn.proj.deltas[0].scale
    assert v == q / 8
    model = timm.create_model("test_vit", num_classes=3)
    inject(model, SnellConfig(rank=4, scale=0.1))
    assert {delta.scale for delta in deltas(model).values()} == {0.1}


@pytest.mark.parametrize("sparsifier", ["magnitude", "soft"])
def test_sparsifiers_of_the_method_keep_the_published_scale(sparsifier: str) -> None:
    assert SnellDelta(384, 30, SnellConfig(sparsifier=sparsifier)).scale == 0.1
    assert SnellDelta(384, 30, SnellConfig(sparsifier=sparsifier, scale=0.5)).scale == 0.5


def test_a_pattern_of_sparsities_gives_each_layer_its_scale() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))

    inject(model, SnellConfig(rank=4, sparsity=0.0, targets=["."], sparsity_pattern={"1": 0.75}))

    first, second = (layer.deltas[0].scale for layer in model)
    assert second == pytest.approx(2 * first)


@pytest.mark.parametrize("scale", ["large", 0, -1.0, float("inf")])
def test_a_scale_that_is_none_is_refused(scale: object) -> None:
    with pytest.raises(UserError, match="scale must be a positive number or auto, not"):
        SnellConfig(scale=scale)
