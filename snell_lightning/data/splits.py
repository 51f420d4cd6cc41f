"""What a data source hands over, and how files without ready splits are split.

A source is a function `(root, val_fraction, test_fraction, seed, fixed, classes) -> Splits`. It lists samples and opens
none of them; `Splits.open_image` does that later, in the loader's workers.

Files are split by their names: where one goes depends on its own path, so that photographs can be added and removed
without another one changing sides.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.images import open_image_file

Sample = tuple[Any, int]
"""What `open_image` takes (a path, an array, ...), and the label."""
SplitName = Literal["train", "val", "test"]
PUBLISHED = "on the test images, which chose the epoch: the published protocol"


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
        notes: Lines on what was found that a user may not expect, such as files that were left out.
        by_fractions: Whether val or test were split off, rather than found.
        fixed: Where samples were put that would have gone elsewhere by their names, by name.
        in_shards: Whether images lie in a row in files, whose numbers are the first entries of `open_image`'s sources.
        listed_in: The file or folder whose lists name the samples' files, some of which may not be there.
    """

    train: Sequence[Sample]
    val: Sequence[Sample]
    test: Sequence[Sample]
    classes: tuple[str, ...]
    open_image: Callable[[Any], Image.Image] = open_image_file
    notes: tuple[str, ...] = ()
    by_fractions: bool = False
    fixed: Mapping[str, SplitName] = field(default_factory=dict)
    in_shards: bool = False
    listed_in: Path | None = None

    def require_files(self) -> None:
        """Raise unless the files that lists name are there.

        Raises:
            UserError: Some are not.
        """
        for name in ("train", "val", "test") if self.listed_in else ():
            part = getattr(self, name)
            if absent := [path for path, _ in part if not os.path.isfile(path)]:
                raise UserError(
                    f"{len(absent):,} of the {len(part):,} {name} images listed in {self.listed_in} are not there, "
                    f"such as {absent[0]}; check-data names them all"
                )

    def as_published(self) -> "Splits":
        """With val among the training images, and the test images in its place.

        Raises:
            UserError: There are no test images.
        """
        if not self.test:
            raise UserError("data.protocol published reports the best score on test images, and there are none")
        return replace(self, train=[*self.train, *self.val], val=self.test)

    def with_classes(self, classes: Sequence[str]) -> "Splits":
        """The same samples with labels that are indices into `classes`, which may be more than there are here.

        Raises:
            UserError: There is a class here that `classes` lacks.
        """
        if set(self.classes) - set(classes):
            raise UserError(
                f"the images are of the classes {listed(self.classes)}, and the model's are {listed(classes)}; "
                "give the folders the model's names, or train anew"
            )
        labels = [classes.index(name) for name in self.classes]

        def mapped(part: Sequence[Sample]) -> list[Sample]:
            return [(source, labels[label]) for source, label in part]

        return replace(
            self, train=mapped(self.train), val=mapped(self.val), test=mapped(self.test), classes=tuple(classes)
        )


def name_of(source: Any, open_image: Callable[[Any], Image.Image], index: int) -> str:
    """What to call an image: its path, or what its opener calls it, or its number.

    Args:
        source: What the opener takes.
        open_image: The opener.
        index: The image's number.
    """
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    named = getattr(open_image, "name", None)
    return str(index) if named is None else named(source)


class Source(Protocol):
    """A function that finds a data set's samples."""

    def __call__(
        self,
        root: Path | None,
        val_fraction: float,
        test_fraction: float,
        seed: int,
        fixed: Mapping[str, SplitName] | None = None,
        classes: Sequence[str] | None = None,
    ) -> Splits: ...


def split_by_name(
    samples: Mapping[str, Sample],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    fixed: Mapping[str, SplitName] | None = None,
) -> tuple[dict[SplitName, list[Sample]], dict[str, SplitName]]:
    """Split samples by a hash of their names, so that no sample's split depends on which others there are.

    A class that would have no sample in a split gets one moved there, if it has enough, and that is the exception to
    the rule: the moves are returned. Given back as `fixed`, they hold, and none is added.

    Args:
        samples: All samples by name, such as `ant/7.jpg`.
        val_fraction: Share of all samples that goes to val, in [0, 1).
        test_fraction: Share of all samples that goes to test, in [0, 1).
        seed: Another seed is another split.
        fixed: Moves of an earlier call, by name.

    Returns:
        Train, val and test samples, each in the order of `samples`, and the moves by name.
    """
    places = {name: _place(name, seed) for name in samples}

    def by_place(name: str) -> SplitName:
        if places[name] < test_fraction:
            return "test"
        return "val" if places[name] < test_fraction + val_fraction else "train"

    given = {unicodedata.normalize("NFC", name): split for name, split in (fixed or {}).items()}
    chosen = {name: given.get(unicodedata.normalize("NFC", name)) or by_place(name) for name in samples}
    moves = dict(given)
    if fixed is None:
        wanted: list[SplitName] = ["train"]
        wanted += ["val"] if val_fraction else []
        wanted += ["test"] if test_fraction else []
        of_class: dict[int, list[str]] = {}
        for name, (_, label) in samples.items():
            of_class.setdefault(label, []).append(name)
        for names in of_class.values():
            moves |= _moves(sorted(names, key=places.__getitem__), chosen, wanted)
        chosen |= moves
    parts: dict[SplitName, list[Sample]] = {"train": [], "val": [], "test": []}
    for name, sample in samples.items():
        parts[chosen[name]].append(sample)
    return parts, moves


def as_splits(
    samples: Mapping[str, Mapping[str, Sample]],
    classes: tuple[str, ...],
    rule: tuple[float, float, int],
    fixed: Mapping[str, SplitName] | None,
) -> Splits:
    """Samples by name of ready splits, or under "" of none, as splits; what is missing is split off.

    Args:
        samples: Those of each split, by name; all under `""` where nothing says in which split they are.
        classes: Names of the classes.
        rule: Shares of val and test, in [0, 1), and the seed.
        fixed: Splits of single samples, as an earlier call settled them.

    Raises:
        UserError: There are too few samples to split val off.
    """
    val_fraction, test_fraction, seed = rule
    whole = "" in samples
    if not whole and ("val" in samples or "train" not in samples):
        train, val, test = (list(samples.get(name, {}).values()) for name in ("train", "val", "test"))
        return Splits(train, val, test, classes)
    together = samples["" if whole else "train"]
    parts, moves = split_by_name(together, val_fraction, test_fraction if whole else 0.0, seed, fixed)
    if not parts["val"]:
        raise UserError(
            f"{len(together)} images of {len(classes)} classes are too few to split {val_fraction:.0%} off for val; "
            "add images or raise data.val_fraction"
        )
    test = parts["test"] if whole else list(samples.get("test", {}).values())
    return Splits(parts["train"], parts["val"], test, classes, by_fractions=True, fixed=moves)


def lacking(splits: Splits) -> list[str]:
    """A line for each split that has images, and none of some class."""
    return [
        f"no {name} image of {listed(absent, 5)}"
        for name in ("train", "val", "test")
        if (part := getattr(splits, name)) and (absent := classes_lacking(part, splits.classes))
    ]


def _place(name: str, seed: int) -> float:
    """A number in [0, 1) that a name and a seed stand for, on every machine."""
    text = f"{seed}/{unicodedata.normalize('NFC', name)}"
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _moves(names: Sequence[str], chosen: Mapping[str, SplitName], wanted: Sequence[SplitName]) -> dict[str, SplitName]:
    """Which samples of one class are moved so that every wanted split has one, first train, then val, then test."""
    moves: dict[str, SplitName] = {}
    for split in wanted:
        now = {name: moves.get(name, chosen[name]) for name in names}
        counts = Counter(now.values())
        if counts[split]:
            continue
        # From the fullest split; only train may take another's last one.
        spare = 1 if split == "train" else 2
        donors = [name for name in names if counts[now[name]] >= spare]
        if donors:
            fullest = max(counts[now[name]] for name in donors)
            donors = [name for name in donors if counts[now[name]] == fullest]
            moves[donors[-1] if split == "train" else donors[0]] = split
    return moves


def classes_lacking(part: Sequence[Sample], classes: Sequence[str]) -> list[str]:
    """Names of the classes that have no sample in a split."""
    present = {label for _, label in part}
    return [name for label, name in enumerate(classes) if label not in present]


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names in one line, the first of them where there are many."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
