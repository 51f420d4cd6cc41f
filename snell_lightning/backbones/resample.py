"""Resample what a backbone learned for one image size to another, where timm's own loading does not.

timm does it for most families when weights are loaded. For the rest the kinds of tensors that depend on the size are
few, and known by their shapes: grids of positions, with class and register tokens before them or cut into blocks, and
tables of the distances between them.
"""

import math
import re
from collections.abc import Mapping

import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Size, Tensor, nn

# Names of tensors that belong to places in the image; others are never resampled.
_OF_PLACES = re.compile(r"pos_embed|patch_pos|relative_position|attention_bias|rel_pos|_rel$")


def resampled(name: str, tensor: Tensor, model: nn.Module, shape: Size) -> Tensor | None:
    """A tensor of positions in another shape, bicubic; None if it is none, or of another width.

    Args:
        name: Its name in the model.
        tensor: Of one image size, fp32 or other floating point.
        model: The model that is to have it, which says how many tokens come before the positions.
        shape: What is wanted.
    """
    if not _OF_PLACES.search(name) or tensor.ndim != len(shape):
        return None
    given = tensor.float()
    made = None
    if len(shape) == 4 and shape[0] == tensor.shape[0] == 1:
        if shape[1] == tensor.shape[1] and shape[3] == tensor.shape[3] and _side(shape[1]) and _side(shape[2]):
            made = _of_blocks(given, shape)
        elif shape[1] == tensor.shape[1]:
            made = _grid(given, shape[2], shape[3])
        elif shape[3] == tensor.shape[3]:
            made = _grid(given.permute(0, 3, 1, 2), shape[1], shape[2]).permute(0, 2, 3, 1)
    elif len(shape) == 3 and shape[0] == tensor.shape[0] == 1 and shape[2] == tensor.shape[2]:
        own = getattr(model, "num_prefix_tokens", 0)
        for tokens in (own, 0, 1):
            if _side(shape[1] - tokens) and _side(tensor.shape[1] - tokens):
                side = _side(shape[1] - tokens)
                made = resample_abs_pos_embed(given, [side, side], num_prefix_tokens=tokens)
                break
    elif len(shape) == 2 and shape[0] == tensor.shape[0] and _side(shape[1]) and _side(tensor.shape[1]):
        made = _table(given, _side(shape[1]))
    elif len(shape) == 2 and shape[1] == tensor.shape[1]:
        if _side(shape[0]) and _side(tensor.shape[0]):
            made = _table(given.T, _side(shape[0])).T
        else:
            made = F.interpolate(given.T[None], size=shape[0], mode="linear", align_corners=False)[0].T
    return None if made is None or made.shape != shape else made.to(tensor.dtype).contiguous()


def fit(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The same tensors, those of positions in the shapes that the model has."""
    own = model.state_dict()
    fitted = dict(tensors)
    for name, tensor in tensors.items():
        if name in own and tensor.shape != own[name].shape:
            made = resampled(name, tensor, model, own[name].shape)
            fitted[name] = tensor if made is None else made
    return fitted


def _side(count: int) -> int:
    """The side of a square grid of so many places; 0 if they make none."""
    root = math.isqrt(max(count, 0))
    return root if root * root == count else 0


def _grid(tensor: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(tensor, size=(height, width), mode="bicubic", antialias=True, align_corners=False)


def _table(tensor: Tensor, side: int) -> Tensor:
    """A table `(rows, distances)` for a square of another side; the smallest and the largest stay at the ends."""
    own = _side(tensor.shape[1])
    table = tensor.reshape(1, -1, own, own)
    return F.interpolate(table, size=(side, side), mode="bicubic", align_corners=True).reshape(len(tensor), -1)


def _of_blocks(tensor: Tensor, shape: Size) -> Tensor:
    """Positions `(1, blocks, places, width)` of a grid that is cut into square blocks."""
    blocks, own, side, width = _side(shape[1]), _side(tensor.shape[2]), _side(shape[2]), shape[3]
    whole = tensor.view(blocks, blocks, own, own, width).permute(4, 0, 2, 1, 3).reshape(1, width, blocks * own, -1)
    larger = _grid(whole, blocks * side, blocks * side).view(width, blocks, side, blocks, side)
    return larger.permute(1, 3, 2, 4, 0).reshape(shape)
