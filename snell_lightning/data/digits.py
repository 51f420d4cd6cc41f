"""The `digits` source: the 1,797 handwritten 8 x 8 digits that ship inside scikit-learn (no download)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.splits import Sample, SplitName, Splits

_BRIGHTEST = 16  # scikit-learn's pixels run from 0 to 16


def digits(
    root: Path | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    fixed: Mapping[str, SplitName] | None = None,
    classes: Sequence[str] | None = None,
) -> Splits:
    """Ten classes of white digits on black, split by a seed, each class in the same proportion in all splits.

    Args:
        root: Must be `None`.
        val_fraction: Share of all images that goes to val, in [0, 1).
        test_fraction: Share of all images that goes to test, in [0, 1).
        seed: Seed of the split.
        fixed: Not needed, as the digits are always the same.
        classes: Not needed, as all classes are always there.

    Raises:
        UserError: A root was given, or a fraction leaves a split without an image of each class.
    """
    if root is not None:
        raise UserError(
            f"data.source digits takes no data.root (given {root}); to read images from there set data.source to folder"
        )
    # A heavy import, of which other sources have no need.
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / _BRIGHTEST)).astype(np.uint8)
    samples = [(image, int(label)) for image, label in zip(pixels, data.target, strict=True)]
    rest, test = _split_off(samples, test_fraction, seed, "test")
    train, val = _split_off(rest, val_fraction / (1 - test_fraction), seed, "val")
    names = tuple(str(name) for name in data.target_names)
    return Splits(train, val, test, names, open_digit, by_fractions=True)


def _split_off(samples: list[Sample], fraction: float, seed: int, name: str) -> tuple[list[Sample], list[Sample]]:
    """What is left and what was split off, stratified by class, each in the order of `samples`."""
    if fraction == 0:
        return samples, []
    labels = [label for _, label in samples]
    size = max(round(fraction * len(samples)), len(set(labels)))
    if len(samples) - size < len(set(labels)):
        raise UserError(
            f"{len(samples)} digits are too few to split {fraction:.0%} off for {name}; lower data.{name}_fraction"
        )
    from sklearn.model_selection import train_test_split

    kept, taken = train_test_split(range(len(samples)), test_size=size, stratify=labels, random_state=seed)
    return [samples[index] for index in sorted(kept)], [samples[index] for index in sorted(taken)]


def open_digit(pixels: NDArray[np.uint8]) -> Image.Image:
    """Turn grey levels (8, 8), 0 to 255, into an RGB image."""
    return Image.fromarray(pixels).convert("RGB")
