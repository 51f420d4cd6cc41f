"""The digits source."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.digits import digits


def test_every_digit_is_in_exactly_one_split_of_60_15_and_25_percent() -> None:
    splits = digits(None, 0.15, 0.25, seed=0)
    # 1797 * 0.25 = 449.25 and 1797 * 0.15 = 269.55, rounded.
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1078, 270, 449)
    assert splits.classes == tuple("0123456789")


def test_each_class_has_the_same_share_in_every_split() -> None:
    splits = digits(None, 0.15, 0.25, seed=0)
    parts = [Counter(label for _, label in part) for part in (splits.train, splits.val, splits.test)]
    for label in range(10):
        total = sum(part[label] for part in parts)
        for part, share in zip(parts, (0.6, 0.15, 0.25), strict=True):
            assert abs(part[label] - share * total) <= 2


def test_the_split_depends_on_the_seed() -> None:
    def pixels(seed: int) -> "np.ndarray":
        return np.stack([image for image, _ in digits(None, 0.15, 0.25, seed).test])

    assert np.array_equal(pixels(0), pixels(0))
    assert not np.array_equal(pixels(0), pixels(1))


def test_digits_are_rgb_images_with_the_full_range_of_grey() -> None:
    splits = digits(None, 0.15, 0.25, seed=0)
    image = splits.open_image(splits.train[0][0])
    assert (image.mode, image.size) == ("RGB", (8, 8))
    pixels = np.stack([np.asarray(splits.open_image(digit)) for digit, _ in splits.test])
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_a_root_is_refused_because_it_would_be_ignored() -> None:
    with pytest.raises(UserError, match=r"takes no data.root .*set data.source to folder"):
        digits(Path("images"), 0.15, 0.25, seed=0)
