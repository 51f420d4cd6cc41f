"""What a data source hands over, and the seeded stratified split that sources without ready splits share.

A source is a function `(root, val_fraction, test_fraction, seed) -> Splits`. It lists samples and opens none
of them; `Splits.open_image` does that later, in the loader's workers.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from snell_lightning.adapters.errors import UserError

Sample = tuple[Any, int]
"""What `open_image` takes (a path, an array, ...), and the label."""


def open_image_file(path: str) -> Image.Image:
    """Read a whole image file as RGB.

    Raises:
        Exception: Whatever PIL raises for a missing, truncated, oversized or foreign file.
    """
    with Image.open(path) as image:
        return image.convert("RGB")


@dataclass(frozen=True)
class Splits:
    """The samples of a data set, by split.

    Args:
        train: Samples to train on.
        val: Samples to select the model with; may be empty.
        test: Samples to report on; may be empty.
        classes: Class names; a label is an index into them.
        open_image: Turns a sample's first entry into an RGB image. A module-level function, so that it can be
            sent to a worker process.
    """

    train: Sequence[Sample]
    val: Sequence[Sample]
    test: Sequence[Sample]
    classes: tuple[str, ...]
    open_image: Callable[[Any], Image.Image] = open_image_file


class Source(Protocol):
    """A function that finds a data set's samples."""

    def __call__(self, root: Path | None, val_fraction: float, test_fraction: float, seed: int) -> Splits: ...


def split_three_ways(
    samples: Sequence[Sample], classes: Sequence[str], val_fraction: float, test_fraction: float, seed: int
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Split samples into train, val and test, each class in about the same proportion in all of them.

    Args:
        samples: All samples.
        classes: Class names, for messages.
        val_fraction: Share of all samples that goes to val, in [0, 1).
        test_fraction: Share of all samples that goes to test, in [0, 1).
        seed: The split depends on this and on the samples' order alone.

    Returns:
        Train, val and test samples, each in the order of `samples`.

    Raises:
        UserError: A class has fewer samples than there are splits, or there are too few samples in all.
    """
    shares = {"train": 1.0, "val": val_fraction, "test": test_fraction}
    _require_per_class(samples, classes, [name for name, share in shares.items() if share > 0])
    rest, test = split_off(samples, classes, test_fraction, seed, "test")
    train, val = split_off(rest, classes, val_fraction / (1 - test_fraction), seed, "val")
    return train, val, test


def split_off(
    samples: Sequence[Sample], classes: Sequence[str], fraction: float, seed: int, name: str
) -> tuple[list[Sample], list[Sample]]:
    """Split a share of the samples off, stratified by class and no smaller than the number of classes.

    Args:
        samples: Samples to share out.
        classes: Class names, for messages.
        fraction: Share that is split off, in [0, 1); 0 splits nothing off.
        seed: The split depends on this and on the samples' order alone.
        name: The new split's name, for messages.

    Returns:
        What is left and what was split off, each in the order of `samples`.

    Raises:
        UserError: A class has fewer than two samples, or there are too few samples in all.
    """
    if fraction == 0:
        return list(samples), []
    _require_per_class(samples, classes, ["train", name])
    labels = [label for _, label in samples]
    present = len(set(labels))
    size = max(round(fraction * len(samples)), present)
    if len(samples) - size < present:
        raise UserError(
            f"{len(samples)} images of {present} classes are too few to split {fraction:.0%} off for {name}"
            f"; the smallest class is {_smallest(samples, classes)}; add images or lower data.{name}_fraction"
        )
    # A heavy import, of which sources with ready splits have no need.
    from sklearn.model_selection import train_test_split

    kept, taken = train_test_split(range(len(samples)), test_size=size, stratify=labels, random_state=seed)
    return [samples[index] for index in sorted(kept)], [samples[index] for index in sorted(taken)]


def _require_per_class(samples: Sequence[Sample], classes: Sequence[str], splits: Sequence[str]) -> None:
    """Every class needs at least one sample for each split."""
    if samples and min(Counter(label for _, label in samples).values()) < len(splits):
        raise UserError(
            f"class {_smallest(samples, classes)} is too small to be split into {', '.join(splits)}: at "
            f"least {len(splits)} images per class are needed; add images, or remove the class"
        )


def _smallest(samples: Sequence[Sample], classes: Sequence[str]) -> str:
    counts = Counter(label for _, label in samples)
    label = min(counts, key=lambda candidate: (counts[candidate], candidate))
    return f"{classes[label]!r} ({counts[label]} image{'' if counts[label] == 1 else 's'})"
