"""The `digits` source: the 1,797 handwritten 8 x 8 digits that ship inside scikit-learn (no download)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.splits import Splits, split_three_ways

_BRIGHTEST = 16  # scikit-learn's pixels run from 0 to 16


def digits(root: Path | None, val_fraction: float, test_fraction: float, seed: int) -> Splits:
    """Ten classes of white digits on black, split by a seeded stratified split.

    Args:
        root: Must be `None`.
        val_fraction: Share of all images that goes to val, in [0, 1).
        test_fraction: Share of all images that goes to test, in [0, 1).
        seed: Seed of the split.

    Raises:
        UserError: A root was given.
    """
    if root is not None:
        raise UserError(
            f"data.source digits takes no data.root (given {root}); to read images from there set data.source to folder"
        )
    # A heavy import, of which other sources have no need.
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / _BRIGHTEST)).astype(np.uint8)
    classes = tuple(str(name) for name in data.target_names)
    samples = [(image, int(label)) for image, label in zip(pixels, data.target, strict=True)]
    train, val, test = split_three_ways(samples, classes, val_fraction, test_fraction, seed)
    return Splits(train, val, test, classes, open_digit)


def open_digit(pixels: NDArray[np.uint8]) -> Image.Image:
    """Turn grey levels (8, 8), 0 to 255, into an RGB image."""
    return Image.fromarray(pixels).convert("RGB")
