"""The `torchvision:NAME` sources: torchvision's own image-classification sets, downloaded where that is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.splits import Sample, SplitName, Splits, as_splits

_Arguments = dict[str, Any]


def _named(**splits: str) -> dict[str, _Arguments]:
    return {name: {"split": theirs} for name, theirs in splits.items()}


_TRAINED: dict[str, _Arguments] = {"train": {"train": True}, "test": {"train": False}}
_TWO, _THREE = _named(train="train", test="test"), _named(train="train", val="val", test="test")
# What each set's class takes for each split; under "" one that has no splits of its own.
SETS: dict[str, dict[str, _Arguments]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"), _TRAINED),
    "EMNIST": {name: {"split": "balanced", **arguments} for name, arguments in _TRAINED.items()},
    **dict.fromkeys(("Food101", "GTSRB", "STL10", "SVHN", "StanfordCars"), _TWO),
    "OxfordIIITPet": _named(train="trainval", test="test"),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"), _THREE),
    "Country211": _named(train="train", val="valid", test="test"),
    **dict.fromkeys(("CLEVRClassification", "Imagenette", "ImageNet"), _named(train="train", val="val")),
    "Places365": _named(train="train-standard", val="val"),
    **{name: {"": {}} for name in ("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397")},
}
# Where these classes keep an image's label; the last ones as the second of a pair.
_LABELS, _PAIRS = ("_labels", "targets", "labels", "y"), ("_samples", "samples")


class OpenFrom:
    """Opens an image of one of a set's splits, `(split, index)`."""

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        self.datasets = datasets

    def name(self, source: tuple[str, int]) -> str:
        """Split and number."""
        return "{} {}".format(*source)

    def __call__(self, source: tuple[str, int]) -> Image.Image:
        """An RGB image."""
        split, index = source
        return self.datasets[split][index][0].convert("RGB")


def torchvision_set(
    name: str,
    download: bool,
    root: Path | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    fixed: Mapping[str, SplitName] | None = None,
    classes: Sequence[str] | None = None,
) -> Splits:
    """One of torchvision's sets in its own splits; what it has no split of is split off, as of a folder.

    Args:
        name: torchvision's, such as `Flowers102`.
        download: Fetch it into the root where it is not there.
        root: The folder that torchvision keeps it in.
        val_fraction: Share that goes to val where the set has none, in [0, 1).
        test_fraction: Share that goes to test where the set has no splits, in [0, 1).
        seed: Seed of the split.
        fixed: Splits of single images, as an earlier call settled them.
        classes: Not needed, as all classes are always there.

    Raises:
        UserError: There is no such set, or it is not in the root and cannot be had.
    """
    if name not in SETS:
        raise UserError(f"data.source torchvision:{name} is none of torchvision's sets; there are {', '.join(SETS)}")
    if root is None:
        raise UserError(f"data.source torchvision:{name} needs data.root, the folder that torchvision keeps it in")
    import torchvision

    made: dict[str, Any] = {}
    for split, arguments in SETS[name].items():
        wanted = arguments if name == "ImageNet" else {**arguments, "download": download}
        try:
            made[split] = getattr(torchvision.datasets, name)(str(root.expanduser()), **wanted)
        except Exception as error:  # each of them fails in its own way
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            advice = "it could not be downloaded" if download else "set data.download true to fetch it"
            raise UserError(f"torchvision's {name} is not in {root}: {advice} ({line})") from error
    labels = {split: _labels(name, dataset) for split, dataset in made.items()}
    count = max(max(each) for each in labels.values()) + 1
    samples: dict[str, dict[str, Sample]] = {
        split: {f"{split}/{index}": ((split, index), label) for index, label in enumerate(each)}
        for split, each in labels.items()
    }
    first = next(iter(made.values()))
    known = getattr(first, "classes", None) or getattr(first, "categories", None) or ()
    # ImageNet has several words for a class.
    names = [", ".join(each) if isinstance(each, tuple) else str(each) for each in known]
    if len(names) != count or len(set(names)) < count:
        names = [str(number) for number in range(count)]
    splits = as_splits(samples, tuple(names), (val_fraction, test_fraction, seed), fixed)
    return replace(splits, open_image=OpenFrom(made))


def _labels(name: str, dataset: Any) -> list[int]:
    """The label of each image, without one being opened."""
    for attribute in _LABELS:
        if (found := getattr(dataset, attribute, None)) is not None and len(found) == len(dataset):
            # QMNIST says more than the class.
            return [int(label[0] if getattr(label, "ndim", 0) else label) for label in found]
    for attribute in _PAIRS:
        if (found := getattr(dataset, attribute, None)) is not None and len(found) == len(dataset):
            return [int(label) for _, label in found]
    # PCAM has its labels in a file of their own, and a few have them nowhere else.
    return [int(dataset[index][1]) for index in range(len(dataset))]
