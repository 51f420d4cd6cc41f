"""What people call an image, as the RGB image that the transforms take."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.images import as_rgb, open_image_file, upright, why_unreadable

Picture: TypeAlias = str | PathLike[str] | Image.Image | NDArray[Any] | Tensor
"""A path, a PIL image, an array `(height, width)` or `(height, width, channels)`, or a tensor `(channels, height,
width)`; of 8 bits, or floats from 0 to 1. Channels: 1, 3 or 4."""


def as_picture(given: Picture) -> Image.Image:
    """The RGB image; a file is turned upright, transparency is put on white.

    Raises:
        UserError: A file cannot be read, or an array or a tensor is not an image as above.
    """
    if isinstance(given, Image.Image):
        return as_rgb(upright(given))
    if isinstance(given, (str, PathLike)):
        try:
            return open_image_file(Path(given))
        except Exception as error:  # PIL's decoders raise whatever a broken file leads them to
            raise UserError(f"cannot read image {given}: {why_unreadable(error)}") from error
    if isinstance(given, Tensor):
        if given.ndim != 3:
            raise UserError(f"a tensor of shape {tuple(given.shape)} is not an image; expected (channels, H, W)")
        return _from_array(given.detach().cpu().movedim(0, -1).numpy(), "(channels, H, W)")
    if isinstance(given, np.ndarray):
        return _from_array(given, "(H, W) or (H, W, channels)")
    raise UserError(f"{type(given).__name__} is not an image; expected a path, a PIL image, a numpy array or a tensor")


def several(given: Picture | Sequence[Picture]) -> list[Picture] | None:
    """The images of a list, or of a batch in one array or tensor; None where a single image is given."""
    if isinstance(given, (str, PathLike, Image.Image)):
        return None
    if isinstance(given, (np.ndarray, Tensor)):
        return list(given) if given.ndim == 4 else None
    return list(given)


def _from_array(pixels: NDArray[Any], expected: str) -> Image.Image:
    shape = pixels.shape
    if pixels.ndim == 3 and shape[-1] == 1:
        pixels = pixels[..., 0]
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))) or not pixels.size:
        raise UserError(f"an array of shape {shape} is not an image; expected {expected} with 1, 3 or 4 channels")
    if pixels.dtype == np.uint8:
        return as_rgb(Image.fromarray(np.ascontiguousarray(pixels)))
    if not np.issubdtype(pixels.dtype, np.floating):
        raise UserError(f"an image of {pixels.dtype}; expected 8 bits (uint8), or floats from 0 to 1")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"an image of floats from {low:.4g} to {high:.4g}; expected 0 to 1: what is normalised already goes to "
            "`.model` itself"
        )
    return as_rgb(Image.fromarray(np.round(np.ascontiguousarray(pixels) * 255).astype(np.uint8)))


def default_device() -> torch.device:
    """The accelerator, where there is one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device or torch.device("cpu")
