"""Small models, and what tests of published weights do with them."""

import re
from typing import Any

import timm
import torch
from torch import Tensor, nn

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 64, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 8}
HIERA = {"img_size": 64, "embed_dim": 16, "stages": (1, 1, 1, 1)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 24)}


def lively(model: nn.Module) -> nn.Module:
    """All tensors drawn anew, so that each of them shows in the output."""
    torch.manual_seed(7)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            wide = ("norm" in name and name.endswith("weight")) or name.endswith("running_var")
            tensor.copy_(1 + 0.1 * torch.randn_like(tensor) if wide else 0.2 * torch.randn_like(tensor))
            if name.endswith("running_var"):
                tensor.abs_()
    return model.eval()


def images(pixels: int = 32) -> Tensor:
    return torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def made(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 3, **arguments}).eval()


def renamed(model: nn.Module, *rules: tuple[str, str], prefix: str = "") -> dict[str, Tensor]:
    """A model's tensors under other names."""
    found = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[prefix + name] = tensor.clone()
    return found


def features(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward_head(model.forward_features(x), pre_logits=True)
