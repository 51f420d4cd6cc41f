"""The `datasets` sources: a set of the Hugging Face hub, or a folder in a form that their library `datasets` reads."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.folder import split_named
from snell_lightning.data.images import open_image_file
from snell_lightning.data.splits import Sample, SplitName, Splits, as_splits, lacking, listed
from snell_lightning.data.table import in_order

_LABELS = ("label", "labels", "fine_label")


class OpenRow:
    """Opens the image of one of a set's rows, `(split, index)`.

    Args:
        parts: Each split's column of encoded images.
        column: Its name.
    """

    def __init__(self, parts: Mapping[str, Any], column: str) -> None:
        self.parts, self.column = parts, column

    def name(self, source: tuple[str, int]) -> str:
        """Split and number."""
        return "{} {}".format(*source)

    def __call__(self, source: tuple[str, int]) -> Image.Image:
        """An RGB image."""
        split, index = source
        image = self.parts[split][index][self.column]
        if image is None:
            raise ValueError("the row has no image")
        return open_image_file(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))


def hugging_face(
    name: str,
    root: Path | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    fixed: Mapping[str, SplitName] | None = None,
    classes: Any = None,
    columns: Mapping[str, str] | None = None,
) -> Splits:
    """A set in its own splits; what it has no split of is split off, as of a folder.

    Args:
        name: On the hub, `ORG/NAME`, with `:CONFIG` behind it where there are several; empty for a folder.
        root: The folder: saved by `save_to_disk`, or with Parquet files, or whatever else `load_dataset` takes.
        val_fraction: Share that goes to val where the set has none, in [0, 1).
        test_fraction: Share that goes to test where the set has no splits, in [0, 1).
        seed: Seed of the split.
        fixed: Splits of single images, as an earlier call settled them.
        classes: Not needed, as all classes are always there.
        columns: Names of the columns `image` and `label`, where they cannot be told from their types.

    Raises:
        UserError: The set cannot be had, the package `datasets` is missing, or its columns are not as expected.
    """
    if unknown := sorted((columns or {}).keys() - {"image", "label"}):
        raise UserError(f"data.columns has {unknown[0]!r}; of a Hugging Face set it names the columns image and label")
    if bool(name) == (root is not None):
        raise UserError("data.source datasets needs a name, datasets:ORG/NAME, or a folder as data.root, and not both")
    parts, notes = _splits(_load(name, root), name or str(root))
    first = next(iter(parts.values()))
    image, label = _columns(first.features, dict(columns or {}), name or str(root))
    labels = {split: list(part[label]) for split, part in parts.items()}
    names = getattr(first.features[label], "names", None)
    for split, each in list(labels.items()):
        hidden = sum(value is None or (names is not None and value < 0) for value in each)
        if hidden and hidden < len(each):
            raise UserError(f"{hidden:,} of the {len(each):,} rows of {split} have no label in column {label!r}")
        if hidden:
            notes.append(f"the images of {split} have no labels and are not used")
            del labels[split], parts[split]
    if not labels:
        raise UserError(f"no row of {name or root} has a label in column {label!r}")
    if names is None:
        names = in_order({str(value) for each in labels.values() for value in each})
        labels = {split: [names.index(str(value)) for value in each] for split, each in labels.items()}
    if len(names) < 2:
        raise UserError(f"{name or root} has {len(names)} class(es) in its column {label!r}; at least two are needed")
    whole = list(parts) == ["train"]
    samples: dict[str, dict[str, Sample]] = {
        "" if whole else split: {f"{split}/{index}": ((split, index), value) for index, value in enumerate(each)}
        for split, each in labels.items()
    }
    splits = as_splits(samples, tuple(names), (val_fraction, test_fraction, seed), fixed)
    encoded = {str(split): _encoded(part, image) for split, part in parts.items()}
    return replace(splits, open_image=OpenRow(encoded, image), notes=(*notes, *lacking(splits)))


def _load(name: str, root: Path | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("Hugging Face sets need datasets: pip install 'snell_lightning[datasets]'") from error
    try:
        if root is not None:
            folder = root.expanduser()
            if not folder.is_dir():
                raise UserError(f"there is no folder {root}; expected one that the library `datasets` has saved")
            saved = any((folder / file).is_file() for file in ("dataset_dict.json", "dataset_info.json", "state.json"))
            return datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
        place, _, config = name.partition(":")
        return datasets.load_dataset(place, config or None)
    except UserError:
        raise
    except Exception as error:  # the library fails in many ways, of the network's among others
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the set {name or root} cannot be had: {line}") from error


def _splits(found: Any, where: str) -> tuple[dict[SplitName, Any], list[str]]:
    """A set's parts by split, and lines on those that are none."""
    if not hasattr(found, "items"):
        return {"train": found}, []
    parts: dict[SplitName, Any] = {}
    unused = []
    for theirs, part in found.items():
        split = split_named(theirs)
        if split is None or split in parts:
            unused.append(theirs)
        else:
            parts[split] = part
    if not parts:
        raise UserError(f"{where} has the splits {listed(unused)}; expected train, val or test")
    return parts, [f"not used of {where}: {listed(unused)}"] if unused else []


def _columns(features: Mapping[str, Any], given: dict[str, str], where: str) -> tuple[str, str]:
    """Names of the columns of images and labels."""
    for name in given.values():
        if name not in features:
            raise UserError(f"{where} has no column {name!r} but {', '.join(map(repr, features))}")
    of_type = {kind: [name for name, each in features.items() if type(each).__name__ == kind] for kind in _TYPES}
    image = given.get("image") or _only(of_type["Image"])
    label = given.get("label") or _only([name for name in features if name in _LABELS]) or _only(of_type["ClassLabel"])
    if image is None or label is None or type(features[image]).__name__ != "Image":
        have = ", ".join(f"{name!r} ({type(each).__name__})" for name, each in features.items())
        raise UserError(
            f"{where} has the columns {have}; name an Image and its label: "
            "--data.columns '{image: img, label: class}'"
        )
    return image, label


_TYPES = ("Image", "ClassLabel")


def _only(names: Iterable[str]) -> str | None:
    several = list(names)
    return several[0] if len(several) == 1 else None


def _encoded(part: Any, image: str) -> Any:
    """The rows of a part with their images as they are stored."""
    import datasets

    return part.select_columns([image]).cast_column(image, datasets.Image(decode=False))
