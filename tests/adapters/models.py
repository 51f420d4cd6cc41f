"""Tiny timm models, one for each way in which a backbone may hold its layers, with random weights."""

from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellDelta

CLASSES = 5
_TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_TINY_SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 4)}
_TINY_EVA = {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 3}


class Family(NamedTuple):
    """How to make a tiny model, and what injecting into it must find."""

    name: str
    arguments: dict
    image_size: int
    # One block's adapted layers, and how many there are in the whole model.
    block: str
    layers: list[str]
    count: int
    heads: list[str]
    # Linear layers or 1x1 convolutions outside the blocks.
    left_alone: list[str]


FAMILIES = {
    "vit": Family(
        "test_vit",
        {"img_size": 32},
        32,
        "blocks.0.",
        ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
        24,
        ["head"],
        ["patch_embed.proj"],
    ),
    "deit-distilled": Family(
        "deit_tiny_distilled_patch16_224",
        _TINY_VIT,
        32,
        "blocks.1.",
        ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
        8,
        ["head", "head_dist"],
        ["patch_embed.proj"],
    ),
    "beit": Family(
        "beit_base_patch16_224",
        _TINY_VIT,
        32,
        "blocks.1.",
        ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
        8,
        ["head"],
        ["patch_embed.proj"],
    ),
    "eva02": Family(
        "eva02_tiny_patch14_224",
        _TINY_EVA,
        28,
        "blocks.0.",
        ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
        8,
        ["head"],
        ["patch_embed.proj"],
    ),
    "eva02-separate-qkv": Family(
        "eva02_base_patch14_224",
        _TINY_EVA,
        28,
        "blocks.0.",
        ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"],
        14,
        ["head"],
        ["patch_embed.proj"],
    ),
    "swin": Family(
        "swin_tiny_patch4_window7_224",
        _TINY_SWIN,
        32,
        "layers.0.blocks.1.",
        ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
        12,
        ["head.fc"],
        ["patch_embed.proj", "layers.1.downsample.reduction"],
    ),
    "swinv2": Family(
        "swinv2_tiny_window8_256",
        _TINY_SWIN,
        32,
        "layers.1.blocks.0.",
        ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
        12,
        ["head.fc"],
        ["patch_embed.proj", "layers.1.downsample.reduction", "layers.0.blocks.0.attn.cpb_mlp.0"],
    ),
    "convnext": Family(
        "test_convnext",
        {},
        32,
        "stages.0.blocks.0.",
        ["mlp.fc1", "mlp.fc2"],
        18,
        ["head.fc"],
        ["stem.0", "stages.1.downsample.1", "stages.0.blocks.0.conv_dw"],
    ),
    "convnext-1x1": Family(
        "test_convnext",
        {"conv_mlp": True},
        32,
        "stages.0.blocks.0.",
        ["mlp.fc1", "mlp.fc2"],
        18,
        ["head.fc"],
        ["stem.0", "stages.1.downsample.1", "stages.0.blocks.0.conv_dw"],
    ),
    "efficientnet": Family(
        "test_efficientnet",
        {},
        32,
        "blocks.3.0.",
        ["conv_pw", "se.conv_reduce", "se.conv_expand", "conv_pwl"],
        10,
        ["classifier"],
        ["conv_stem", "blocks.3.0.conv_dw", "conv_head"],
    ),
    "mobilevit": Family(
        "mobilevit_xxs",
        {},
        64,
        "stages.2.1.transformer.0.",
        ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
        56,
        ["head.fc"],
        ["stem.conv"],
    ),
}


def make_model(family: str, seed: int = 0) -> nn.Module:
    """The family's model in evaluation mode; the same seed gives the same weights.

    Fresh models often start with blocks or heads that contribute nothing (layer scales of 1e-6, norms of 0,
    head weights of 1e-5). Vectors and heads are therefore drawn anew, so that each layer reaches the logits.
    """
    torch.manual_seed(seed)
    model = timm.create_model(FAMILIES[family].name, num_classes=CLASSES, **FAMILIES[family].arguments)
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            nn.init.uniform_(parameter, 0.2, 1.0)
    for head in FAMILIES[family].heads:
        nn.init.normal_(model.get_submodule(head).weight, std=0.1)
    return model.eval()


def make_images(family: str) -> Tensor:
    """Two images of the family's size."""
    size = FAMILIES[family].image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def large_config(**settings: object) -> SnellConfig:
    """Settings under which updates are as large as weights, once `enlarge` has drawn the factors."""
    return SnellConfig(**{"rank": 4, "sparsity": 0.5, "sparsifier": "hard", "scale": 0.05, **settings})


def enlarge(model: nn.Module, each: Callable[[Tensor], object] = nn.init.normal_) -> nn.Module:
    """Draw all factors with values of order 1."""
    for module in model.modules():
        if isinstance(module, SnellDelta):
            each(module.in_factors)
            each(module.out_factors)
    return model
