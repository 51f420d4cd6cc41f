"""Heights and widths of images: how they are given, and which of them a backbone takes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from snell_lightning.adapters.errors import UserError

ImageSize = int | tuple[int, int]
"""Pixels per side of a square, or height and width."""

# What sides are multiples of: patches of 14 and 16, five halvings, windows of 7 and 8 after them.
_STEPS = (16, 14, 32, 28, 56, 64)
_TRIED = 8


def sides(size: ImageSize | Sequence[int]) -> tuple[int, int]:
    """Height and width, in pixels.

    Raises:
        UserError: They are neither one whole number above 0 nor two.
    """
    found = (size, size) if isinstance(size, int) else tuple(size)
    if len(found) != 2 or any(not isinstance(side, int) or side < 1 for side in found):
        raise UserError(
            f"data.image_size is {size}; expected the pixels of a square's side, or height and width as [224, 320]"
        )
    return found


def as_size(size: ImageSize | Sequence[int]) -> ImageSize:
    """One number for a square, else height and width."""
    height, width = sides(size)
    return height if height == width else (height, width)


def pixels(size: ImageSize | Sequence[int]) -> str:
    """As people write it: `224 x 320`."""
    return " x ".join(map(str, sides(size)))


def takes(model: nn.Module, size: ImageSize) -> Exception | None:
    """Run a model on an image of that size: what it fails of, or None."""
    known: Any = model.pretrained_cfg
    training, device = model.training, next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, known["input_size"][0], *sides(size), device=device))
    except Exception as error:  # each model has its own way to refuse a size
        return error
    finally:
        model.train(training)
    return None


def sizes_near(size: ImageSize, create: Callable[[ImageSize], Any]) -> list[ImageSize]:
    """The nearest smaller and larger size that a backbone takes, as far as that is found without its weights.

    Args:
        size: One that it does not take.
        create: Makes the model for a size; called under the meta device, where nothing is computed.
    """
    height, width = sides(size)

    def moved(step: int, up: bool) -> ImageSize:
        rounded = [max(1, side // step + (up and side % step > 0)) * step for side in (height, width)]
        return as_size(rounded)

    found = []
    for up in (False, True):
        near = {moved(step, up) for step in _STEPS} - {size}
        for candidate in sorted(near, key=lambda each: abs(sum(sides(each)) - height - width))[:_TRIED]:
            try:
                with torch.device("meta"):
                    model = create(candidate)
                taken = takes(model, candidate) is None
            except Exception:
                taken = False
            if taken:
                found.append(candidate)
                break
    return found
