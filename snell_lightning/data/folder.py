"""The `folder` source: image files sorted into one folder per class.

Two layouts are read. With ready splits (`val` may also be called `valid` or `validation`):

    root/train/<class>/*.jpg    root/val/<class>/*.jpg    root/test/<class>/*.jpg

where a missing `val` is split off `train` and a missing `test` leaves the test split empty; and without:

    root/<class>/*.jpg

which is split into train, val and test. The result depends on names and the seed alone, not on the file
system's order.
"""

import os
from pathlib import Path

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.splits import Sample, Splits, split_off, split_three_ways

# Those of torchvision's ImageFolder.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_VAL_NAMES = ("val", "valid", "validation")
_LAYOUT = "expected ROOT/train/CLASS/IMAGE with val and test beside train, or ROOT/CLASS/IMAGE"


def folder(root: Path | None, val_fraction: float, test_fraction: float, seed: int) -> Splits:
    """Images under `root`, one folder per class; classes are the sorted names of the training folders.

    Args:
        root: The folder that holds `train`, or the class folders.
        val_fraction: Share that goes to val where there is no val folder, in [0, 1).
        test_fraction: Share that goes to test where there are no split folders at all, in [0, 1).
        seed: Seed of the split.

    Raises:
        UserError: The root is missing or laid out otherwise, there are fewer than two classes, a class has no
            images or too few to be split, or a val or test folder has a class that train does not have.
    """
    if root is None:
        raise UserError(f"data.source folder needs data.root; {_LAYOUT}")
    root = root.expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"data.root {root} {what}; {_LAYOUT}")
    if (root / "train").is_dir():
        return _ready_splits(root, val_fraction, seed)
    if any((root / name).is_dir() for name in (*_VAL_NAMES, "test")):
        raise UserError(f"data.root {root} has a val or test folder and no train folder; {_LAYOUT}")
    classes = _classes(root)
    samples = _samples(root, classes)
    train, val, test = split_three_ways(samples, classes, val_fraction, test_fraction, seed)
    return Splits(train, val, test, classes)


def _ready_splits(root: Path, val_fraction: float, seed: int) -> Splits:
    """The layout with a train folder."""
    classes = _classes(root / "train")
    train = _samples(root / "train", classes)
    val_folders = [root / name for name in _VAL_NAMES if (root / name).is_dir()]
    if len(val_folders) > 1:
        names = " and ".join(path.name for path in val_folders)
        raise UserError(f"data.root {root} has the folders {names}, which mean the same; keep one")
    if val_folders:
        val = _samples(val_folders[0], classes)
    else:
        train, val = split_off(train, classes, val_fraction, seed, "val")
    test = _samples(root / "test", classes) if (root / "test").is_dir() else []
    return Splits(train, val, test, classes)


def _classes(path: Path) -> tuple[str, ...]:
    """Sorted names of the class folders in a folder, at least two."""
    names = _folders(path)
    if len(names) < 2:
        found = f"has only one class folder, {names[0]!r}" if names else "has no class folders"
        raise UserError(f"{path} {found}; at least two classes are needed: {_LAYOUT}")
    return tuple(names)


def _samples(path: Path, classes: tuple[str, ...]) -> list[Sample]:
    """Every image of the class folders in a folder, in the order of classes and then of paths."""
    names = _folders(path)
    if not names:
        raise UserError(f"{path} has no class folders; {_LAYOUT}")
    labels = {name: label for label, name in enumerate(classes)}
    samples: list[Sample] = []
    for name in names:
        if name not in labels:
            raise UserError(f"{path / name} is a class that train does not have; rename it or move it away")
        images = _images(path / name)
        if not images:
            raise UserError(
                f"class folder {path / name} has no images ({' '.join(EXTENSIONS)}); add some or remove the folder"
            )
        samples += [(image, labels[name]) for image in images]
    return samples


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(path: Path) -> list[str]:
    """Paths of all images below a folder, sorted; hidden files and folders are left out, links followed."""
    images = []
    for here, folders, files in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images += [
            os.path.join(here, name) for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(images)
