"""`nn.MultiheadAttention` opened up: torch's own outputs, masks, weights and names, in every way that it is called."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, inject, merge
from snell_lightning.adapters.layers.attention import OpenAttention, close_attention, open_attention

from .models import enlarge, large_config


def pair(**settings: Any) -> tuple[nn.Module, nn.Module]:
    """Torch's own attention, and the same opened."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, **settings)}).eval()
    nn.init.normal_(plain["attn"].in_proj_weight)
    opened = copy.deepcopy(plain)
    open_attention(opened)
    assert isinstance(opened["attn"], OpenAttention)
    return plain["attn"], opened["attn"]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("weights", ["none", "mean", "each"])
@pytest.mark.parametrize("mask", ["none", "causal", "float", "heads", "padding", "both"])
def test_it_computes_what_torchs_own_does(batch_first: bool, bias: bool, cross: bool, weights: str, mask: str) -> None:
    plain, opened = pair(batch_first=batch_first, bias=bias)
    x, y = random(3, 5, 8), random(3, 6, 8) if cross else None
    x, y = (x, y) if batch_first else (x.transpose(0, 1), None if y is None else y.transpose(0, 1))
    keys = 6 if cross else 5
    masks: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": {"attn_mask": torch.ones(5, keys).triu(1).bool(), "is_causal": not cross},
        "float": {"attn_mask": random(5, keys)},
        "heads": {"attn_mask": random(6, 5, keys)},
        "padding": {"key_padding_mask": torch.arange(keys)[None] >= torch.tensor([[keys], [3], [1]])},
        "both": {"attn_mask": random(5, keys), "key_padding_mask": random(3, keys)},
    }
    options = {"need_weights": weights != "none", "average_attn_weights": weights == "mean", **masks[mask]}
    second = x if y is None else y

    expected, expected_weights = plain(x, second, second, **options)
    found, found_weights = opened(x, second, second, **options)

    assert torch.allclose(found, expected, atol=1e-5)
    assert (found_weights is None) == (expected_weights is None)
    if expected_weights is not None:
        assert torch.allclose(found_weights, expected_weights, atol=1e-5)


def test_without_a_batch() -> None:
    plain, opened = pair()
    x, mask = random(5, 8), torch.tensor([False, False, False, True, True])

    for options in ({}, {"key_padding_mask": mask}, {"need_weights": False}):
        for found, expected in zip(opened(x, x, x, **options), plain(x, x, x, **options), strict=True):
            assert expected is found is None or torch.allclose(found, expected, atol=1e-5)


def test_dropout_falls_on_the_weights_in_training_alone() -> None:
    _, opened = pair(dropout=0.5, batch_first=True)
    x = random(3, 5, 8)
    for need in (True, False):
        evaluated = opened.eval()(x, x, x, need_weights=need)[0]
        trained = [opened.train()(x, x, x, need_weights=need)[0] for _ in range(2)]
        assert not torch.equal(trained[0], trained[1])
        assert torch.equal(opened.eval()(x, x, x, need_weights=need)[0], evaluated)


def test_names_in_a_state_dict_are_torchs() -> None:
    plain, opened = pair()
    assert opened.state_dict().keys() == plain.state_dict().keys()
    state = {name: tensor + 1 for name, tensor in plain.state_dict().items()}

    assert not any(opened.load_state_dict(state))

    assert torch.equal(opened.in_proj.weight, state["in_proj_weight"])
    assert torch.equal(copy.deepcopy(opened).state_dict()["in_proj_bias"], state["in_proj_bias"])


def test_closed_it_is_the_same_attention() -> None:
    plain = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"attn": plain})
    weight = plain.in_proj_weight

    open_attention(model)
    close_attention(model)

    assert model["attn"] is plain
    assert plain.in_proj_weight is weight


@pytest.mark.parametrize("settings", [{"kdim": 4}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_it_cannot_do_is_left_as_it_is(settings: dict[str, Any]) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, **settings)})

    open_attention(model)

    assert type(model["attn"]) is nn.MultiheadAttention


@pytest.mark.parametrize("layer", ["in_proj", "out_proj"])
def test_one_of_its_layers_may_be_adapted_alone(layer: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.other = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.attn(x, x, x, need_weights=False)[0]
            return self.other(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model = nn.Sequential(Block())
    x = random(3, 5, 8)

    assert inject(model, large_config(rank=2, targets=[rf"attn\.{layer}$"]), example=x) == [f"0.attn.{layer}"]

    # Where nothing is adapted, nothing is opened.
    assert type(model[0].other) is nn.MultiheadAttention
    enlarge(model)
    tuned = model(x)
    assert torch.allclose(merge(model)(x), tuned, atol=1e-4)
    assert type(model[0].attn) is nn.MultiheadAttention
    before = copy.deepcopy(model).state_dict()
    assert inject(model, SnellConfig(rank=2, targets=[layer]), example=x) == [f"0.attn.{layer}", f"0.other.{layer}"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
