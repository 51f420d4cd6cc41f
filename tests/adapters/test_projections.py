"""Issue row C6: which rows are q, k and v is seen in what the model does with them, and each competes by itself."""

import copy
import logging
from typing import ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellLinear, UserError, deltas, inject, merge
from snell_lightning.adapters.finding import adaptable_layers
from snell_lightning.adapters.projections import divide

from .models import enlarge, large_config

HEADS, WIDTH = 2, 8


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`(batch, heads, tokens, width)` each; without torch's own function for it."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


class Attention(nn.Module):
    """Holds projections in a layer of any name, and divides its output in a way of its own."""

    outputs = 3 * WIDTH
    expected: tuple[list[int], ...] = ()
    values: ClassVar = {2}

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.out = nn.Linear(WIDTH, self.outputs), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = attend(*self.split(self.mixed(x)))
        return x + self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError


def rows(*ranges: range) -> list[int]:
    return [row for part in ranges for row in part]


class OneBelowTheOther(Attention):
    expected = (rows(range(8)), rows(range(8, 16)), rows(range(16, 24)))

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.view(*y.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)


class HeadByHead(Attention):
    expected = (
        rows(range(4), range(12, 16)),
        rows(range(4, 8), range(16, 20)),
        rows(range(8, 12), range(20, 24)),
    )

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.view(*y.shape[:2], HEADS, -1).transpose(1, 2).chunk(3, dim=-1)


class Unequal(Attention):
    outputs = 2 * (2 + 2 + 4)
    expected = (rows(range(2), range(8, 10)), rows(range(2, 4), range(10, 12)), rows(range(4, 8), range(12, 16)))

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.view(*y.shape[:2], HEADS, -1).transpose(1, 2).split([2, 2, 4], dim=-1)


class Interleaved(Attention):
    expected = (rows(range(0, 24, 3)), rows(range(1, 24, 3)), rows(range(2, 24, 3)))

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        return y.view(*y.shape[:2], HEADS, -1, 3).transpose(1, 2).unbind(-1)


class Rotary(OneBelowTheOther):
    """Mixes the halves of each head of q and k, which stay one projection."""

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        q, k, v = super().split(y)
        angles = torch.arange(y.shape[1])[:, None] * torch.ones(2)

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            cos, sin = angles.cos(), angles.sin()
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        return rotate(q), rotate(k), v


class Normed(OneBelowTheOther):
    """Normalises q and k, and windows all three, which copies them."""

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (part.reshape(-1, HEADS, 4, part.shape[-1]) for part in super().split(y))
        q, k = F.layer_norm(q, q.shape[-1:]), k / k.norm(dim=-1, keepdim=True)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        y = attend(*self.split(self.mixed(x)))
        return x + self.out(y.reshape(*x.shape[:2], -1))


class TorchsOwn(HeadByHead):
    def forward(self, x: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(*self.split(self.mixed(x)))
        return x + self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))


class Transposed(OneBelowTheOther):
    """Attention with values from the left, `v^T A^T`."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.mixed(x))
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        y = v.transpose(-2, -1) @ weights.transpose(-2, -1)
        return x + self.out(y.permute(0, 3, 1, 2).reshape(*x.shape[:2], -1))


class OfChannels(OneBelowTheOther):
    """Averages channels, not tokens: each value goes to all of them."""

    values: ClassVar = set()

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (part.transpose(-2, -1) for part in super().split(y))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        y = attend(*self.split(self.mixed(x)))
        return x + self.out(y.permute(0, 3, 1, 2).reshape(*x.shape[:2], -1))


class TalkingHeads(OneBelowTheOther):
    """A layer mixes the heads' weights, so that these are of its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.mixed(x))
        weights = (q @ k.transpose(-2, -1)).softmax(-1)
        y = self.talk(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v
        return x + self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))


class Latent(nn.Module):
    """q is a parameter; one layer holds k and v."""

    expected = (rows(range(8)), rows(range(8, 16)))
    values: ClassVar = {1}

    def __init__(self) -> None:
        super().__init__()
        self.q, self.mixed, self.out = (
            nn.Parameter(torch.randn(3, WIDTH)),
            nn.Linear(WIDTH, 16),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.mixed(x).chunk(2, -1)
        return self.out(attend(self.q.expand(len(x), 1, -1, -1), k[:, None], v[:, None])[:, 0])


class GatedUnit(nn.Module):
    expected = (rows(range(8)), rows(range(8, 16)))
    values: ClassVar = set()

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.out = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, values = self.mixed(x).chunk(2, -1)
        return self.out(F.silu(gate) * values)


class Branching(nn.Module):
    """Two halves that go separate ways and are not multiplied: one layer, with a gate that another layer makes."""

    expected = (rows(range(16)),)
    values: ClassVar = set()

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.gate, self.out = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, WIDTH), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.mixed(x).chunk(2, -1)
        return self.out(torch.cat([first * self.gate(x).sigmoid(), second], -1))


class Perceptron(nn.Module):
    expected = (rows(range(32)),)
    values: ClassVar = set()

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.out = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.gelu(self.mixed(x)))


LAYOUTS = [
    OneBelowTheOther,
    HeadByHead,
    Unequal,
    Interleaved,
    Rotary,
    Normed,
    TorchsOwn,
    Transposed,
    OfChannels,
    TalkingHeads,
    Latent,
    GatedUnit,
    Branching,
    Perceptron,
]


class TestLayouts:
    @pytest.mark.parametrize("kind", LAYOUTS)
    def test_of_any_kind_and_name_are_seen(self, kind: type[nn.Module]) -> None:
        model = nn.Sequential(nn.Sequential(kind()))
        layers = adaptable_layers(model)
        values: set[tuple[str, int]] = set()
        found = divide(model, layers, layers, values=values)
        assert found["0.0.mixed"] == list(kind.expected)
        # Attention averages them over the tokens.
        assert values == {("0.0.mixed", place) for place in kind.values}
        assert all(len(parts) == 1 for name, parts in found.items() if name != "0.0.mixed")

    @pytest.mark.parametrize("kind", [HeadByHead, Unequal, Interleaved])
    def test_an_update_changes_its_own_projection_alone(self, kind: type[Attention]) -> None:
        model = nn.Sequential(nn.Sequential(kind()))
        inject(model, large_config(rank=2, sparsity=0.0))
        layer = model[0][0].mixed
        x = torch.randn(1, 4, WIDTH)
        before = layer(x)
        for delta, part in zip(layer.deltas, kind.expected, strict=True):
            with torch.no_grad():
                delta.in_factors.normal_()
            after = layer(x)
            changed = (after != before).any(0).any(0).nonzero().flatten().tolist()
            assert changed == part
            before = after

    @pytest.mark.parametrize(
        ("name", "layer", "expected"),
        [
            ("mobilevitv2_050", "stages.2.1.transformer.0.attn.qkv_proj", [1, 64, 64]),
            ("test_coatnet", "stages.2.blocks.0.attn.qkv", None),
            ("tiny_vit_5m_224", "stages.1.blocks.0.attn.qkv", [128, 128, 128]),
            ("levit_128s", "stages.0.blocks.0.attn.qkv.linear", [64, 64, 128]),
            ("shvit_s1", "stages.1.blocks.0.mixer.m.qkv.c", [16, 16, 48]),
            ("efficientvit_b0", "stages.2.blocks.1.context_module.main.qkv.conv", [64, 64, 64]),
            ("convit_tiny", "blocks.0.attn.qk", [192, 192]),
            ("tnt_s_legacy_patch16_224", "blocks.0.attn_in.qk", [24, 24]),
            ("gcvit_xxtiny", "stages.0.blocks.0.attn.qkv", [64, 64, 64]),
        ],
    )
    def test_of_timms_families_have_the_sizes_of_their_code(
        self, name: str, layer: str, expected: list[int] | None
    ) -> None:
        with torch.device("meta"):
            model = timm.create_model(name)
        layers = adaptable_layers(model)
        (parts,) = divide(model, layers, [layer]).values()
        count = len(layers[layer].weight)
        assert [len(part) for part in parts] == (expected or [count // 3] * 3)
        assert sorted(row for part in parts for row in part) == list(range(count))

    def test_of_parallel_blocks_are_the_mlp_and_q_k_and_v(self) -> None:
        model = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, block_fn=ParallelScalingBlock
        )
        inject(model, SnellConfig(rank=2))
        layer = model.blocks[0].in_proj
        assert [delta.out_features for delta in layer.deltas] == [96, 24, 24, 24]


class Unclear(Attention):
    """q and k share rows."""

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        y = y.view(*y.shape[:2], HEADS, -1).transpose(1, 2)
        return y[..., :6], y[..., 3:9], y[..., 6:]


class Particular(OneBelowTheOther):
    """Runs on nothing that could be guessed."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


class TestWhatCannotBeSeen:
    @pytest.mark.parametrize("kind", [Unclear, Particular])
    def test_competes_as_one_and_is_named(self, kind: type[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
        model = nn.Sequential(nn.Sequential(kind()))
        inject(model, SnellConfig(rank=2))
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "0.0.mixed" in record.message
        assert "each competes as one" in record.message
        assert len(model[0][0].mixed.deltas) == 1

    def test_may_be_seen_with_an_example(self, caplog: pytest.LogCaptureFixture) -> None:
        model = nn.ModuleList([Particular()])
        model.forward = model[0].forward
        inject(model, SnellConfig(rank=2), example=(torch.zeros(1, 4, WIDTH), torch.ones(())))
        assert not caplog.records
        assert len(model[0].mixed.deltas) == 3

    def test_because_the_example_does_not_fit_is_an_error(self) -> None:
        model = nn.Sequential(nn.Sequential(OneBelowTheOther()))
        with pytest.raises(UserError, match="the model does not run on the example: RuntimeError"):
            inject(model, SnellConfig(rank=2), example=torch.zeros(1, 4, WIDTH + 1))
        assert not deltas(model)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_leaves_timms_attention_as_it_was(self) -> None:
        model = timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2)
        with pytest.raises(UserError, match="does not run on the example"):
            inject(model, SnellConfig(rank=2), example=torch.zeros(1, 3, 31, 31))
        assert model.blocks[0].attn.qkv_bias_separate is False


class TestLooking:
    def test_changes_nothing_and_calls_no_hook(self) -> None:
        model = timm.create_model("test_efficientnet", num_classes=3).train()
        before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
        model.blocks[0].register_forward_hook(lambda *_: pytest.fail("called"))
        layers = adaptable_layers(model)
        divide(model, layers, layers)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(vars(module).keys() == attributes[name].keys() for name, module in model.named_modules())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_works_in_every_precision(self, dtype: torch.dtype) -> None:
        model = timm.create_model("test_vit", num_classes=3).to(dtype)
        inject(model, SnellConfig(rank=2))
        assert len(model.blocks[0].attn.qkv.deltas) == 3

    def test_works_at_another_image_size(self, caplog: pytest.LogCaptureFixture) -> None:
        model = timm.create_model("test_vit", num_classes=3, img_size=32)
        inject(model, SnellConfig(rank=2))
        assert len(model.blocks[0].attn.qkv.deltas) == 3
        assert not caplog.records


def pair(**settings: object) -> tuple[SnellLinear, SnellLinear]:
    """A layer whose parts are scattered, and one with the same parts one below the other."""
    parts = [[0, 5, 2], [1, 8], [3, 4, 6, 7]]
    torch.manual_seed(0)
    linear = nn.Linear(12, 9)
    config = large_config(rank=4, **settings)
    scattered = SnellLinear(copy.deepcopy(linear), config, parts)
    order = [row for part in parts for row in part]
    with torch.no_grad():
        linear.weight.copy_(linear.weight[order])
        linear.bias.copy_(linear.bias[order])
    ordered = SnellLinear(linear, config, [[0, 1, 2], [3, 4], [5, 6, 7, 8]])
    enlarge(scattered)
    ordered.deltas.load_state_dict(scattered.deltas.state_dict())
    return scattered, ordered


class TestScatteredRows:
    order = (0, 5, 2, 1, 8, 3, 4, 6, 7)

    @pytest.mark.parametrize("noise", [0.0, 0.3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
    def test_give_the_numbers_of_rows_in_order(self, sparsity: float, dtype: torch.dtype, noise: float) -> None:
        layers = pair(sparsity=sparsity, dropout=noise, drop_path=noise)
        x, grad_y = torch.randn(3, 7, 12), torch.randn(3, 7, 9)
        outputs, gradients = [], []
        for layer, grad in zip(layers, (grad_y, grad_y[..., list(self.order)]), strict=True):
            torch.manual_seed(1)
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                y = layer.train()(leaf)
            y.backward(grad.to(y.dtype))
            gradients.append([leaf.grad, *(p.grad for p in layer.deltas.parameters())])
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                outputs.append((y.detach(), layer.eval()(x)))
        for one, other in zip(*outputs, strict=True):
            torch.testing.assert_close(one[..., list(self.order)], other)
        for one, other in zip(*gradients, strict=True):
            assert one.any()
            torch.testing.assert_close(one, other, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)

    def test_are_merged_into_their_places(self) -> None:
        scattered, ordered = pair()
        weight = scattered.weight.clone()
        x = torch.randn(4, 12)
        expected = scattered.eval()(x)
        merged = merge(scattered)
        torch.testing.assert_close(merged(x), expected)
        torch.testing.assert_close(
            (merged.weight - weight)[list(self.order)], merge(ordered).weight - weight[list(self.order)]
        )

    def test_are_no_part_of_the_state(self) -> None:
        scattered, ordered = pair()
        assert scattered.state_dict().keys() == ordered.state_dict().keys()

    @pytest.mark.parametrize("parts", [[[0, 1], [1, 2]], [[0], [2]], [[0, 1, 2], []], [[0, 1, 2, 3]]])
    def test_that_are_no_division_are_refused(self, parts: list[list[int]]) -> None:
        with pytest.raises(UserError, match="a layer of 3 outputs cannot be divided so"):
            SnellLinear(nn.Linear(4, 3), SnellConfig(rank=2), parts)
