"""The `folder` source: image files sorted into one folder per class.

Two layouts are read. With ready splits, whatever the case and the usual spelling of their names:

    root/train/<class>/*.jpg    root/val/<class>/*.jpg    root/test/<class>/*.jpg

where a missing `val` is split off `train` and a missing `test` leaves the test split empty; and without:

    root/<class>/*.jpg

which is split into train, val and test. The result depends on names and the seed alone, not on the file
system's order.
"""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.listing import Listing, folders_in, has_images
from snell_lightning.data.splits import Sample, SplitName, Splits, as_splits, lacking, listed

# Besides these, `train_set`, `TestImages` and the like are recognised.
SPELLINGS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_LAYOUT = "expected ROOT/train/CLASS/IMAGE with val and test beside train, or ROOT/CLASS/IMAGE"


def folder(
    root: Path | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    fixed: Mapping[str, SplitName] | None = None,
    classes: Sequence[str] | None = None,
) -> Splits:
    """Images under `root`, one folder per class; classes are the sorted names of the training folders.

    Args:
        root: The folder that holds the split folders, or the class folders.
        val_fraction: Share that goes to val where there is no val folder, in [0, 1).
        test_fraction: Share that goes to test where there are no split folders at all, in [0, 1).
        seed: Seed of the split.
        fixed: Splits of single images by their path below the root, as an earlier call settled them.
        classes: The model's classes, where they are known: some of them may be missing here.

    Raises:
        UserError: The root is missing or laid out otherwise, there are fewer than two classes, a class has no
            images, or a val or test folder has a class that neither train nor the model has.
    """
    if root is None:
        raise UserError(f"data.source folder needs data.root; {_LAYOUT}")
    root = root.expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"data.root {root} {what}; {_LAYOUT}")
    fewest = 1 if classes is not None else 2
    found, notes = _split_folders(root)
    if not found:
        parts: dict[str, dict[str, list[Path]]] = {"": _class_folders(root, fewest)}
        notes += _odd_classes(parts[""])
    elif "train" not in found and classes is None:
        raise UserError(
            f"data.root {root} has a {' and a '.join(path.name for path in found.values())} folder and no train "
            f"folder; {_LAYOUT}; to evaluate on all images of one folder, name that as data.root and set "
            "data.eval_split to all"
        )
    else:
        parts = {name: _class_folders(path, fewest if name == "train" else 1) for name, path in found.items()}
        _require_known(parts, classes or ())
    listing = Listing([path for folders in parts.values() for paths in folders.values() for path in paths])
    names = tuple(sorted({name for folders in parts.values() for name in folders}))
    samples = {name: _samples(root, folders, names, listing) for name, folders in parts.items()}
    splits = as_splits(samples, names, (val_fraction, test_fraction, seed), fixed)
    notes += listing.notes() + lacking(splits)
    return replace(splits, notes=tuple(notes))


def split_named(name: str) -> SplitName | None:
    """The split that a folder's name stands for, if it is one of the usual names."""
    word = re.sub(r"[\W_]+", "", name.lower())
    word = re.sub(r"(?<=\w)(set|data|images|imgs|split)$", "", word)
    return next((split for split, words in SPELLINGS.items() if word in words), None)


def _split_folders(root: Path) -> tuple[dict[SplitName, Path], list[str]]:
    """The folders in `root` that are splits, and lines on what else is there; none where the folders are classes.

    A split holds class folders. A folder of such a name that holds images alone is a class, such as `valid` beside
    `invalid`, or an unlabelled set.
    """
    folders = folders_in(root)
    named = {path: split for path in folders if (split := split_named(path.name))}
    splits = {path: split for path, split in named.items() if folders_in(path) or not has_images(path)}
    bare = [path for path in named if path not in splits]
    if not splits:
        if len(bare) > 1 or (bare and len(folders) == 1):
            raise UserError(
                f"{listed([str(path) for path in bare])}: images and no class folders; a split holds one folder per "
                f"class: {_LAYOUT}"
            )
        return {}, [f"{path.name} is taken for a class, as it holds images and no class folders" for path in bare]
    found: dict[SplitName, Path] = {}
    for path, split in splits.items():
        if split in found:
            raise UserError(
                f"data.root {root} has the folders {found[split].name} and {path.name}, which mean the same; keep one"
            )
        found[split] = path
    for path in bare:
        if named[path] not in found and named[path] != "test":
            raise UserError(f"{path} has no class folders; {_LAYOUT}")
    unused = [f"{path.name}/{' (no class folders)' if path in bare else ''}" for path in folders if path not in splits]
    loose = sum(entry.is_file() for entry in os.scandir(root)) if has_images(root) else 0
    unused += [f"{loose} files"] if loose else []
    return found, [f"not used beside {found.get('train', root).name}/: {listed(unused)}"] if unused else []


def _class_folders(path: Path, fewest: int) -> dict[str, list[Path]]:
    """The class folders in a folder by name; names that are written with other bytes are one class."""
    folders: dict[str, list[Path]] = {}
    for entry in folders_in(path):
        # macOS writes an accent as a character of its own.
        folders.setdefault(unicodedata.normalize("NFC", entry.name), []).append(entry)
    if len(folders) < fewest:
        found = f"has only one class folder, {next(iter(folders))!r}" if folders else "has no class folders"
        inner = [entry for paths in folders.values() for entry in paths if len(folders_in(entry)) > 1]
        hint = f"; did you mean {inner[0]}?" if inner else ""
        raise UserError(f"{path} {found}; at least two classes are needed: {_LAYOUT}{hint}")
    return dict(sorted(folders.items()))


def _require_known(parts: Mapping[str, Mapping[str, list[Path]]], classes: Sequence[str]) -> None:
    if "train" not in parts:
        return
    known = {*parts["train"], *classes}
    for folders in parts.values():
        for name, (path, *_) in folders.items():
            if name not in known:
                raise UserError(f"{path} is a class that train does not have; rename it or move it away")


def _odd_classes(folders: Mapping[str, list[Path]]) -> list[str]:
    """A line where class folders look as if classes were one level further down.

    Raises:
        UserError: They are split folders: each class has its own.
    """
    if any(has_images(path) for paths in folders.values() for path in paths):
        return []
    below = [{inner.name for path in paths for inner in folders_in(path)} for paths in folders.values()]
    if not (common := sorted(set.intersection(*below))):
        return []
    if any(split_named(name) for name in common):
        raise UserError(
            f"each of the class folders {listed(list(folders))} holds the split folders {listed(common)}; {_LAYOUT}: "
            "move the split folders to the top"
        )
    return [f"classes are {listed(list(folders))}; the folders {listed(common)} in each are taken as one"]


def _samples(
    root: Path, folders: Mapping[str, list[Path]], classes: Sequence[str], listing: Listing
) -> dict[str, Sample]:
    """Every image of class folders by its path below the root, in the order of classes and then of paths."""
    samples: dict[str, Sample] = {}
    for name, images in listing.images(folders).items():
        if not images:
            alone = Listing([])
            alone.images({name: folders[name]})
            others = ", ".join(f"{count} {ending}" for ending, count in alone.endings.most_common(3))
            raise UserError(
                f"class folder {folders[name][0]} has no images"
                f"{f' that can be read ({others} are left out)' if others else ''}; add some or remove the folder"
            )
        label = classes.index(name)
        samples |= {os.path.relpath(image, root).replace(os.sep, "/"): (image, label) for image in images}
    return samples
