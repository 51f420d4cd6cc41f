"""Adapters are never left out without a word: not by code that reads a weight, nor by what fuses or exports a model."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snell_lightning.adapters import SnellConfig, SnellLinear, UserError, inject, merge

from .models import enlarge, large_config


class Reading(nn.Module):
    """Computes with a layer's weight by itself where it is told to."""

    def __init__(self, in_training: bool = True, in_evaluation: bool = True) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.in_training, self.in_evaluation = in_training, in_evaluation

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x.to(self.fc1.weight.dtype))
        if self.in_training if self.training else self.in_evaluation:
            return x @ self.fc2.weight.T + self.fc2.bias
        return self.fc2(x)


class Outer(nn.Module):
    """Reads the weight of a layer that lies further in."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8)})])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.blocks[0]["fc"].weight)


class Choosing(nn.Module):
    """Calls a layer some of the time and reads its type at any time, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) if len(x) > 1 else self.fc2(x)


class TestC4WeightsThatAreReadWithoutACall:
    """Issue row C4."""

    @pytest.mark.parametrize("training", [True, False])
    def test_are_found_at_the_forward_that_reads_them(self, training: bool) -> None:
        model = nn.Sequential(Reading(in_training=training, in_evaluation=not training))
        assert inject(model, SnellConfig(rank=2)) == ["0.fc1", "0.fc2"]
        x = torch.randn(2, 8)
        model.train(not training)(x)
        with pytest.raises(UserError) as caught:
            model.train(training)(x)
        assert str(caught.value) == (
            "Reading computes with the weight of 0.fc2 without calling it, so that its update would not count; "
            "leave it out with exclude ['0\\\\.fc2$']"
        )
        merge(model)
        inject(model, SnellConfig(rank=2, exclude=["0\\.fc2$"]))
        model(x)

    @pytest.mark.parametrize("whole", [True, False])
    def test_are_found_where_a_part_alone_is_called(self, whole: bool) -> None:
        model = nn.Sequential(nn.Identity(), Reading())
        inject(model, SnellConfig(rank=2))
        with pytest.raises(UserError, match=r"weight of 1\.fc2"):
            (model if whole else model[1])(torch.randn(2, 8))

    def test_are_found_where_an_outer_module_reads_them(self) -> None:
        model = Outer()
        inject(model, SnellConfig(rank=2))
        with pytest.raises(UserError, match=r"Outer computes with the weight of blocks\.0\.fc"):
            model(torch.randn(2, 8))

    def test_a_layer_that_is_not_needed_this_time_is_no_error(self) -> None:
        model = nn.Sequential(Choosing())
        inject(model, SnellConfig(rank=2))
        for count in (1, 2):
            model(torch.randn(count, 8))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    def test_are_found_in_a_copy(self, copied: object) -> None:
        model = nn.Sequential(Reading())
        inject(model, SnellConfig(rank=2))
        with pytest.raises(UserError, match=r"weight of 0\.fc2"):
            copied(model)(torch.randn(2, 8))

    def test_a_product_with_a_weight_is_a_call_of_its_layer(self) -> None:
        class Product(Reading):
            def forward(self, x: Tensor) -> Tensor:
                shifted = None if self.fc2.bias is None else self.fc2.bias + 1
                return F.linear(F.linear(self.fc1(x), weight=self.fc2.weight, bias=shifted), self.fc2.weight)

        torch.manual_seed(0)
        model = nn.Sequential(Product())
        assert inject(model, large_config(rank=2)) == ["0.fc1", "0.fc2"]
        enlarge(model)
        x = torch.randn(2, 8)
        found = [model(x), copy.deepcopy(model)(x)]
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.randn(2, 7))
        # A mode that outlived the forward would call the layer here.
        assert torch.equal(F.linear(x, model[0].fc2.weight), x @ model[0].fc2.weight.T)
        assert all(torch.allclose(each, merge(model)(x), atol=1e-4) for each in found)

    @pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("recompute", ["none", "inputs", "blocks"])
    def test_torchs_encoder_calls_its_layers_in_evaluation_too(self, recompute: str, padded: bool) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2)
        assert inject(model, large_config(rank=2, recompute=recompute)) == [
            f"layers.{block}.{layer}"
            for block in (0, 1)
            for layer in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
        ]
        enlarge(model)
        x = torch.randn(2, 5, 16)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
        expected = model.train()(x, src_key_padding_mask=padding)
        with torch.no_grad():
            found = model.eval()(x, src_key_padding_mask=padding)
            plain = merge(model)(x, src_key_padding_mask=padding)
        for rows in (expected, plain):
            torch.testing.assert_close(found[0], rows[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found[1, :3], rows[1, :3], rtol=1e-4, atol=1e-4)

    def test_nothing_is_left_behind_after_merging(self) -> None:
        model = nn.Sequential(Reading())
        inject(model, SnellConfig(rank=2))
        merge(model)(torch.randn(2, 8))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def tiny_vit() -> nn.Module:
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    inject(model, SnellConfig(rank=2))
    return model.eval()


IMAGE = torch.zeros(1, 3, 32, 32)


class TestC5WhatNeedsThePlainModel:
    """Issue row C5: one line that says to merge first."""

    @pytest.mark.parametrize(
        "make",
        [
            lambda model: torch.export.export(model, (IMAGE,)),
            lambda model: torch.onnx.export(model, (IMAGE,), "unused.onnx", dynamo=False),
            lambda model: torch.jit.trace(model, IMAGE),
            lambda model: torch.fx.symbolic_trace(model.blocks[0].mlp),
        ],
        ids=["export", "onnx", "trace", "fx"],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_an_export(self, make: object) -> None:
        with pytest.raises(UserError, match=r"^export needs a plain model.*call merge\(model\) first$"):
            make(tiny_vit())

    def test_a_merged_model_can_be_exported(self) -> None:
        model = merge(tiny_vit())
        exported = torch.export.export(model, (IMAGE,)).module()
        torch.testing.assert_close(exported(IMAGE), model(IMAGE))

    # The first fuses by reading weights alone, the others by way of attributes of convolutions too.
    @pytest.mark.parametrize("name", ["levit_128s", "repvit_m0_9", "tiny_vit_5m_224", "ghostnetv3_050", "mobileone_s0"])
    def test_timms_reparameterization(self, name: str) -> None:
        model = timm.create_model(name, num_classes=3)
        inject(model, SnellConfig(rank=2))
        with pytest.raises(UserError, match=r"needs a plain model.*call merge\(model\) first$"):
            reparameterize_model(model.eval())

    def test_an_attribute_of_the_plain_layer(self) -> None:
        layer = SnellLinear(nn.Conv2d(4, 4, 1), SnellConfig(rank=2))
        assert not hasattr(layer, "kernel_size")
        with pytest.raises(UserError, match=r"an adapted layer has no kernel_size; call merge\(model\) first"):
            _ = layer.kernel_size
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = layer.nothing

    def test_methods_are_the_models_own_again_after_merging(self) -> None:
        model = timm.create_model("repvit_m0_9", num_classes=3).eval()
        inject(model, SnellConfig(rank=2))
        merge(model)
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(reparameterize_model(model)(images), model(images), rtol=1e-3, atol=1e-3)


class TestReentrantCheckpoints:
    def test_that_would_drop_all_gradients_are_refused(self) -> None:
        model = tiny_vit().train()
        with pytest.raises(UserError, match=r"use_reentrant=True drops the adapters' gradients.*use_reentrant=False"):
            checkpoint(model.blocks, torch.randn(1, 5, 64), use_reentrant=True)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_that_have_gradients_to_pass_on_give_them_to_the_adapters(self, reentrant: bool) -> None:
        model = tiny_vit().train()
        x = torch.randn(1, 5, 64, requires_grad=reentrant)
        checkpoint(model.blocks, x, use_reentrant=reentrant).sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "_factors" in name)

    def test_training_mode_without_gradients_is_no_checkpoint(self) -> None:
        with torch.no_grad():
            tiny_vit().train()(IMAGE)
