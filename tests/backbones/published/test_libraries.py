"""Weights that other libraries wrote: the logits are those of these libraries' own models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snell_lightning.backbones.published import load_weights
from tests.backbones.published.models import CONVNEXT, SWIN, VIT, features, images, lively, made

HF = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
HF_VIT = {**HF, "intermediate_size": 64}
HF_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 8, "image_size": 64}
HF_CONVNEXT = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 24]}
REGISTERS = {**VIT, "reg_tokens": 4, "no_embed_class": True, "init_values": 1.0}

# transformers' class and configuration, timm's name and arguments, and what of transformers' output is timm's.
Outputs = Callable[[Any], Tensor]
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any], Outputs]] = {
    "vit": ("ViT", HF_VIT, "vit_base_patch16_224", VIT, lambda out: out.last_hidden_state[:, 0]),
    "deit": (
        "DeiT",
        HF_VIT,
        "deit_base_distilled_patch16_224",
        VIT,
        lambda out: out.last_hidden_state[:, :2].mean(1),
    ),
    "beit": (
        "Beit",
        {**HF_VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.1},
        "beit_base_patch16_224",
        {**VIT, "init_values": 0.1},
        lambda out: out.pooler_output,
    ),
    "dinov2": (
        "Dinov2",
        HF,
        "vit_base_patch16_224",
        {**VIT, "init_values": 1.0},
        lambda out: out.last_hidden_state[:, 0],
    ),
    "dinov2_swiglu": (
        "Dinov2",
        {**HF, "use_swiglu_ffn": True},
        "vit_giant_patch14_dinov2",
        {**VIT, "init_values": 1.0, "mlp_ratio": 96 / 16},
        lambda out: out.last_hidden_state[:, 0],
    ),
    "dinov2_registers": (
        "Dinov2WithRegisters",
        HF,
        "vit_base_patch16_224",
        REGISTERS,
        lambda out: out.last_hidden_state[:, 0],
    ),
    "dinov3": (
        "DINOv3ViT",
        {**HF_VIT, "num_register_tokens": 4},
        "vit_small_patch16_dinov3_qkvb",
        {**VIT, "global_pool": "token"},
        lambda out: out.last_hidden_state[:, 0],
    ),
    "clip": ("CLIPVision", HF_VIT, "vit_base_patch32_clip_quickgelu_224", VIT, lambda out: out.pooler_output),
    "siglip": (
        "SiglipVision",
        {**HF_VIT, "hidden_act": "gelu"},
        "vit_base_patch16_siglip_224",
        VIT,
        lambda out: out.pooler_output,
    ),
    "swin": ("Swin", HF_SWIN, "swin_tiny_patch4_window7_224", SWIN, lambda out: out.pooler_output),
    "swinv2": ("Swinv2", HF_SWIN, "swinv2_tiny_window8_256", SWIN, lambda out: out.pooler_output),
    "convnext": ("ConvNext", HF_CONVNEXT, "convnext_tiny", CONVNEXT, lambda out: out.pooler_output),
    "convnextv2": ("ConvNextV2", HF_CONVNEXT, "convnextv2_tiny", CONVNEXT, lambda out: out.pooler_output),
}


@pytest.mark.parametrize("row", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_transformers(row: Any, tmp_path: Path) -> None:
    import transformers

    family, settings, name, arguments, output = row
    config = getattr(transformers, f"{family}Config")(**settings)
    source = lively(getattr(transformers, f"{family}Model")(config))
    source.save_pretrained(tmp_path)
    model = made(name, **arguments)

    loaded = load_weights(model, tmp_path, name)

    x = images(arguments.get("img_size", 32))
    with torch.no_grad():
        expected = output(source(pixel_values=x))
    assert torch.allclose(features(model, x), expected, atol=1e-4)
    # What pre-training alone needs.
    assert set(loaded.left) <= {"mask_token", "pooler.dense.bias", "pooler.dense.weight"}


class TestTorchvision:
    def test_vit(self, tmp_path: Path) -> None:
        from torchvision.models import VisionTransformer

        source = lively(VisionTransformer(32, 8, 2, 2, 16, 64, num_classes=3))
        torch.save(source.state_dict(), tmp_path / "w.pth")
        model = made("vit_base_patch16_224", **VIT)

        loaded = load_weights(model, tmp_path / "w.pth", "vit_base_patch16_224")

        with torch.no_grad():
            assert torch.allclose(model(images()), source(images()), atol=1e-5)
        assert not loaded.new

    @pytest.mark.parametrize("name", ["resnet18", "densenet121", "regnet_y_400mf"])
    def test_convolutions(self, name: str, tmp_path: Path) -> None:
        import torchvision

        source = lively(torchvision.models.get_model(name, num_classes=3))
        torch.save(source.state_dict(), tmp_path / "w.pth")
        timms = {"regnet_y_400mf": "regnety_004"}.get(name, name)
        model = made(timms)

        load_weights(model, tmp_path / "w.pth", timms)

        with torch.no_grad():
            assert torch.allclose(model(images(64)), source(images(64)), rtol=1e-3, atol=1e-3)


TEXT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 3, "decoder_num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "settings", "part", "row", "prefix"),
    [
        ("ViTForImageClassification", HF_VIT, "vit", "vit", "vit."),
        ("ViTMAEForPreTraining", {**HF_VIT, **DECODER, "mask_ratio": 0.0}, "vit", "vit", "vit."),
        ("SwinForImageClassification", HF_SWIN, "swin", "swin", "swin."),
        ("ConvNextForImageClassification", HF_CONVNEXT, "convnext", "convnext", "convnext."),
        ("CLIPModel", {"text_config": TEXT, "vision_config": HF_VIT}, "vision_model", "clip", "vision_model."),
        (
            "SiglipModel",
            {"text_config": TEXT, "vision_config": {**HF_VIT, "hidden_act": "gelu"}},
            "vision_model",
            "siglip",
            "vision_model.",
        ),
    ],
)
def test_transformers_within_a_larger_model(
    kind: str, settings: dict[str, Any], part: str, row: str, prefix: str, tmp_path: Path
) -> None:
    import transformers

    _, _, name, arguments, output = TRANSFORMERS[row]
    model_class = getattr(transformers, kind)
    source = lively(model_class(model_class.config_class(**settings)))
    source.save_pretrained(tmp_path)
    model = made(name, **arguments)

    loaded = load_weights(model, tmp_path, name)

    x = images(arguments.get("img_size", 32))
    with torch.no_grad():
        # MAE shuffles its tokens, on which the class token's output does not depend.
        expected = getattr(source, part)(pixel_values=x)
    assert loaded.place == prefix
    assert torch.allclose(features(model, x), output(expected), atol=1e-4)
