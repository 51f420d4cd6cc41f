"""Which layers are taken, and what is said of those that are not."""

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellLinear, UserError, inject, merge
from snell_lightning.adapters.finding import numbered_blocks, why_not_adaptable
from tests.adapters.models import enlarge, large_config


class Scaled(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(), self.bias)


class Standardised(nn.Conv2d):
    """A convolution whose product is its own."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Renamed(nn.Linear):
    """Another name, the same forward."""


class Gated(nn.Linear):
    """The same forward, and a tensor besides."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gate = nn.Parameter(torch.ones(()))


class Block(nn.Module):
    """A plain layer and another one."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.fc1, self.other = nn.Linear(8, 8), other

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.fc1(x))


def own_forward_on_the_instance() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


UNKNOWN = {
    "own forward": (lambda: Scaled(8, 8), "Scaled has a forward of its own"),
    "own product": (lambda: Standardised(8, 8, 1), "Standardised has a forward of its own"),
    "forward on the instance": (own_forward_on_the_instance, "forward of its own"),
    "another tensor": (lambda: Gated(8, 8), "more than weight and bias: gate"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "weight normalisation"),
    "hooked weight norm": (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), "weight_g, weight_v"),
    "spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "weight_orig"),
    "pruned": (lambda: nn.utils.prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "weight_mask"),
    "one weight": (lambda: nn.Linear(1, 1), "single weight"),
}


class TestC1OwnForward:
    """Issue row C1: only layers whose forward is known are taken."""

    @pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
    @pytest.mark.parametrize("kind", UNKNOWN)
    def test_is_left_alone_by_default_and_refused_by_name_as_a_target(self, kind: str) -> None:
        make, reason = UNKNOWN[kind]
        model = nn.Sequential(Block(make()))
        other = model[0].other
        assert inject(model, SnellConfig(rank=2)) == ["0.fc1"]
        assert model[0].other is other
        with pytest.raises(UserError, match=r"names 0\.other, which cannot be adapted") as caught:
            inject(nn.Sequential(Block(make())), SnellConfig(rank=2, targets=["other"]))
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_model_that_was_never_run_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"0\.other\.weight has no values yet; run the model once"):
            inject(nn.Sequential(Block(nn.LazyLinear(8))), SnellConfig(rank=2))
        with pytest.raises(UserError, match="no weight yet"):
            SnellLinear(nn.LazyLinear(8), SnellConfig(rank=2))

    def test_a_subclass_that_changes_nothing_is_taken(self) -> None:
        model = nn.Sequential(Block(Renamed(8, 8)))
        assert inject(model, SnellConfig(rank=2)) == ["0.fc1", "0.other"]
        assert type(merge(model)[0].other) is Renamed

    @pytest.mark.parametrize("stride", [1, 2])
    def test_what_timm_calls_by_another_name_is_the_plain_product(self, stride: int) -> None:
        layer = timm.layers.Conv2dSame(8, 6, 1, stride=stride)
        x = torch.randn(2, 8, 7, 7)
        tuned = SnellLinear(layer, SnellConfig(rank=2, scale=1e-9))
        assert torch.allclose(tuned(x), layer(x), atol=1e-6)
        x = torch.randn(2, 8)
        linear = timm.layers.linear.Linear(8, 6)
        assert torch.allclose(SnellLinear(linear, SnellConfig(rank=2, scale=1e-9))(x), linear(x), atol=1e-6)

    def test_a_model_of_such_layers_alone_says_why_none_is_found(self) -> None:
        with torch.device("meta"):
            model = timm.create_model("resnetv2_50x1_bit", num_classes=3)
        with pytest.raises(UserError, match="StdConv2d has a forward of its own"):
            inject(model, SnellConfig(rank=2))

    def test_injection_changes_the_output_by_no_more_than_the_update(self) -> None:
        model = nn.Sequential(Block(Scaled(8, 8)))
        x = torch.randn(2, 8)
        before = model(x)
        inject(model, SnellConfig(rank=2, scale=1e-9))
        assert torch.allclose(model(x), before, atol=1e-6)


class TestHooks:
    def test_are_called_and_can_be_removed_while_tuned_and_after_merging(self) -> None:
        model, seen = nn.Sequential(Block(nn.Linear(8, 8))), []
        before = model[0].fc1.register_forward_pre_hook(lambda *_: seen.append("before"))
        after = model[0].fc1.register_forward_hook(lambda *_, **__: seen.append("after"), with_kwargs=True)
        model[0].other.register_full_backward_hook(lambda *_: seen.append("backward"))
        inject(model, SnellConfig(rank=2))
        model(torch.randn(2, 8)).sum().backward()
        assert seen == ["before", "after", "backward"]
        before.remove()
        tuned = model[0].fc1.register_forward_hook(lambda *_: seen.append("tuned"))
        merge(model)
        seen.clear()
        model(torch.randn(2, 8, requires_grad=True)).sum().backward()
        assert seen == ["after", "tuned", "backward"]
        after.remove()
        tuned.remove()
        seen.clear()
        model(torch.randn(2, 8))
        assert seen == []


class TestNumberedBlocks:
    def test_are_children_with_a_number_and_siblings(self) -> None:
        model = timm.create_model("test_resnet", num_classes=2)
        assert {"layer1", "layer4", "layer1.0"} <= numbered_blocks(model)
        model = timm.create_model("regnetx_002", num_classes=2)
        blocks = numbered_blocks(model)
        assert {"s1", "s4", "s4.b1", "s4.b7"} <= blocks
        assert not {"stem", "head", "s1.b1.conv1.conv"} & blocks

    def test_an_only_child_with_a_number_is_none(self) -> None:
        model = nn.Sequential()
        model.add_module("encoder1", nn.Sequential(nn.Linear(2, 2)))
        assert numbered_blocks(model) == {"encoder1.0"}

    def test_a_backbone_with_such_names_alone_is_adapted(self) -> None:
        model = timm.create_model("regnety_002", num_classes=2)
        names = inject(model, SnellConfig(rank=2))
        assert {"s1.b1.conv1.conv", "s1.b1.se.fc1", "s4.b7.conv3.conv"} <= set(names)
        assert not any("downsample" in name for name in names)


class TestASmallShare:
    def test_is_told(self, caplog: pytest.LogCaptureFixture) -> None:
        model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 2, 1)))
        inject(model, SnellConfig(rank=2))
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        # 64 * 2 of 3 * 64 * 9 + 64 + 64 * 2 + 2.
        assert "the layers that are adapted by default (1) hold 6.7% of the backbone's weights" in record.message

    def test_a_large_one_is_not(self, caplog: pytest.LogCaptureFixture) -> None:
        inject(timm.create_model("test_vit", num_classes=2), SnellConfig(rank=2))
        assert not caplog.records


class TestInput:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_that_is_no_floating_point_number_is_an_error(self, dtype: torch.dtype) -> None:
        layer = SnellLinear(nn.Linear(4, 3), large_config(rank=2))
        enlarge(layer)
        with pytest.raises(UserError, match=f"floating-point input, not {dtype}"):
            layer(torch.ones(2, 4, dtype=dtype))

    def test_a_layer_that_can_be_taken_has_no_reason_against_it(self) -> None:
        assert why_not_adaptable(nn.Linear(2, 2)) is None
        assert why_not_adaptable(nn.Conv2d(2, 2, 1, stride=2, bias=False)) is None
