"""The sources `vtab`, `fgvc` and `few_shot`: sets of published benchmarks, from their lists.

cifar/train800.txt  val200.txt  test.txt                 images/train800/000001.jpg 35
CUB_200_2011/train.json  val.json  test.json             {"001.Albatross/1.jpg": 1, ...}
food101/annotations/train_meta.list.num_shot_4.seed_0    apple_pie/1.jpg 0

The lists are ready splits, so that what other sources are told of splitting is of no use here.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.splits import Sample, SplitName, Splits, listed

# Classes of the 19 tasks, in the order in which the benchmark's tables have them.
VTAB: dict[str, int] = {
    "cifar": 100,
    "caltech101": 102,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "svhn": 10,
    "sun397": 397,
    "patch_camelyon": 2,
    "eurosat": 10,
    "resisc45": 45,
    "diabetic_retinopathy": 5,
    "clevr_count": 8,
    "clevr_dist": 6,
    "dmlab": 6,
    "kitti": 4,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}
# Classes of the five sets of FGVC, by how their folders' names begin.
FGVC: dict[str, int] = {"cub": 200, "nabirds": 555, "oxfordflower": 102, "stanfordcar": 196, "stanforddog": 120}
_VTAB_FILES: dict[SplitName, str] = {"train": "train800.txt", "val": "val200.txt", "test": "test.txt"}
_FGVC_FILES: dict[SplitName, str] = {"train": "train.json", "val": "val.json", "test": "test.json"}
_VTAB_LAYOUT = (
    "expected ROOT/train800.txt, ROOT/val200.txt and ROOT/test.txt, each with lines `images/NAME.jpg CLASS`, where "
    f"ROOT is the folder of one of the tasks {', '.join(VTAB)}; the set is VTAB-1k (arXiv 1910.04867), in the form "
    "that the authors of NOAH give it (github.com/ZhangYuanhan-AI/NOAH)"
)
_FGVC_LAYOUT = (
    "expected ROOT/train.json, ROOT/val.json and ROOT/test.json, each {IMAGE: CLASS, ...}, with the images in ROOT, "
    "ROOT/images or ROOT/Images, where ROOT is the folder of CUB-200-2011, NABirds, Oxford Flowers, Stanford Cars or "
    "Stanford Dogs; the lists are those of VPT (github.com/KMnP/vpt), the images are the sets' own"
)
_FEW_SHOT_LAYOUT = (
    "the list SET/annotations/train_meta.list.num_shot_N.seed_S, with val_meta.list and test_meta.list beside it, each "
    "with lines `NAME.jpg CLASS`, and the images in SET or SET/images; the lists are those of the authors of NOAH "
    "(github.com/ZhangYuanhan-AI/NOAH), the images are the sets' own"
)


def vtab(root: Path | None, *_: Any, **__: Any) -> Splits:
    """One task of VTAB-1k: 800 images to train on, 200 to select with, and its test images. Classes are numbers.

    Args:
        root: The task's folder, whose name is the task's.

    Raises:
        UserError: A list is missing or not of that form, or a class is not one of the task's.
    """
    root = _folder_with("vtab", root, _VTAB_FILES, _VTAB_LAYOUT)
    task = root.resolve().name
    parts = {split: read_list(root / name, root) for split, name in _VTAB_FILES.items()}
    known = VTAB.get(task)
    count = max(label for samples in parts.values() for _, label in samples) + 1 if known is None else known
    for split, samples in parts.items():
        if (largest := max(label for _, label in samples)) >= count:
            raise UserError(
                f"{root / _VTAB_FILES[split]} has class {largest}, and {task} has the {count} classes 0 to {count - 1}"
            )
    notes = (f"{task} is none of VTAB's tasks: {count} classes are taken from its lists",) if known is None else ()
    names = tuple(str(number) for number in range(count))
    return Splits(parts["train"], parts["val"], parts["test"], names, notes=notes, listed_in=root)


def fgvc(root: Path | None, *_: Any, **__: Any) -> Splits:
    """One of the five sets of FGVC, by its lists. Classes are the numbers that the lists have, in order.

    Args:
        root: The set's folder, whose name begins with the set's.

    Raises:
        UserError: A list is missing or not of that form, or the classes are not as many as the
            set has.
    """
    root = _folder_with("fgvc", root, _FGVC_FILES, _FGVC_LAYOUT)
    lists = {split: _read_json(root / name) for split, name in _FGVC_FILES.items()}
    numbers = sorted({number for entries in lists.values() for number in entries.values()})
    name = re.sub(r"[^a-z]", "", root.resolve().name.lower())
    known = next((count for start, count in FGVC.items() if name.startswith(start)), None)
    if known is not None and known != len(numbers):
        raise UserError(f"the lists in {root} have {len(numbers)} classes, and this set has {known}; fetch them anew")
    base = _base(root, next(iter(lists["train"])))
    labels = {number: label for label, number in enumerate(numbers)}
    parts: dict[SplitName, list[Sample]] = {}
    for split, entries in lists.items():
        parts[split] = [(str(base / path), labels[number]) for path, number in entries.items()]
    notes = () if known else (f"{root.name} is none of FGVC's sets: {len(numbers)} classes are taken from its lists",)
    names = tuple(map(str, numbers))
    return Splits(parts["train"], parts["val"], parts["test"], names, notes=notes, listed_in=root)


def few_shot(root: Path | None, *_: Any, **__: Any) -> Splits:
    """A few images of each class to train on, with the lists of validation and test images beside theirs.

    Args:
        root: The list of the images to train on, `SET/annotations/train_meta.list.num_shot_N.seed_S`.

    Raises:
        UserError: A list is missing or not of that form, or a class is not trained on.
    """
    if root is None or not root.expanduser().is_file():
        found = [] if root is None else sorted(root.expanduser().rglob("train_meta.list.num_shot_*.seed_*"))
        there = f"; there are {listed([str(path) for path in found])}" if found else ""
        raise UserError(f"data.source few_shot needs as data.root {_FEW_SHOT_LAYOUT}{there}")
    file = root.expanduser()
    folder = file.resolve().parent.parent
    files: dict[SplitName, Path] = {
        "train": file,
        "val": file.parent / "val_meta.list",
        "test": file.parent / "test_meta.list",
    }
    if absent := [path for path in files.values() if not path.is_file()]:
        raise UserError(f"{absent[0]} is missing beside {file.name}; expected {_FEW_SHOT_LAYOUT}")
    first = file.read_text(encoding="utf-8").partition("\n")[0].strip().rpartition(" ")[0]
    base = _base(folder, first)
    parts = {split: read_list(path, base) for split, path in files.items()}
    count = max(label for _, label in parts["train"]) + 1
    for split, samples in parts.items():
        if (largest := max(label for _, label in samples)) >= count:
            raise UserError(f"{files[split]} has class {largest}, and {file.name} trains 0 to {count - 1}")
    names = tuple(map(str, range(count)))
    return Splits(parts["train"], parts["val"], parts["test"], names, listed_in=file.parent)


def _base(root: Path, first: str) -> Path:
    """Where a set's images lie: in its folder, or in `images` or `Images` there."""
    return next((base for base in (root, root / "images", root / "Images") if (base / first).is_file()), root)


def _folder_with(source: str, root: Path | None, files: Mapping[SplitName, str], layout: str) -> Path:
    """The root, if these files are in it."""
    if root is None or not root.expanduser().is_dir():
        what = f"data.source {source} needs data.root" if root is None else f"there is no folder {root}"
        raise UserError(f"{what}; {layout}")
    if absent := [name for name in files.values() if not (root.expanduser() / name).is_file()]:
        raise UserError(f"{root} has no {' and no '.join(absent)}; {layout}")
    return root.expanduser()


def _read_json(file: Path) -> dict[str, int]:
    """Images and the numbers of their classes."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = {str(path): int(number) for path, number in content.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file} is not of the form {{IMAGE: CLASS, ...}} with whole numbers as classes") from error
    if not entries:
        raise UserError(f"{file} lists no image")
    return entries


def read_list(file: Path, root: Path) -> list[Sample]:
    """The images of a list, and their labels.

    Args:
        file: With lines `PATH LABEL`; empty ones do not count.
        root: Where paths begin.

    Raises:
        UserError: A line is of another form, or there is none.
    """
    samples: list[Sample] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        path, _, label = line.strip().rpartition(" ")
        if not path and not label:
            continue
        if not path or not label.isdecimal():
            raise UserError(f"{file}, line {number}: {line!r}; expected an image's path and the number of its class")
        samples.append((str(root / path.strip()), int(label)))
    if not samples:
        raise UserError(f"{file} lists no image")
    return samples
