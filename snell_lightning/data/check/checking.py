"""Look at every image of every split, and put what was seen together."""

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

from snell_lightning.adapters.errors import UserError
from snell_lightning.backbones.sizes import ImageSize, sides
from snell_lightning.data.check.kinds import KINDS, Finding
from snell_lightning.data.check.looking import Look, look
from snell_lightning.data.check.twins import nearly_same, same
from snell_lightning.data.dataset import processors
from snell_lightning.data.splits import SplitName, Splits, lacking, name_of

_AT_ONCE = 32
_FEW = 5
_IMBALANCE = 10
# An image given at 224 pixels should have 28 at least.
_SHARE_OF_SIZE = 8
_RARE = 0.1


@dataclass(frozen=True)
class Checked:
    """What a check has found.

    Args:
        counts: Images of each class, by split.
        looked_at: How many images were read.
        seconds: How long it took.
        formats: Images by format, `none` for those that are no files.
        sizes: Smallest, median and largest width and height.
        findings: What is wrong or odd, the worst first.
    """

    counts: dict[SplitName, dict[str, int]]
    looked_at: int
    seconds: float
    formats: dict[str, int]
    sizes: dict[str, tuple[int, int, int]]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Those findings that training would fail of, or that make a score wrong."""
        return tuple(finding for finding in self.findings if KINDS[finding.kind].level == "error")


class _Looks(Dataset):
    """A look at each image."""

    def __init__(self, splits: Splits, sources: Sequence[Any], shortest: int) -> None:
        self.open_image, self.sources, self.shortest = splits.open_image, sources, shortest

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Look:
        with warnings.catch_warnings():
            # Of large images; they are counted.
            warnings.simplefilter("ignore")
            return look(self.sources[index], self.open_image, self.shortest)


def check(splits: Splits, image_size: ImageSize, root: Path | None = None, workers: int | None = None) -> Checked:
    """Look at every image of a data set.

    Args:
        splits: Its samples.
        image_size: What the model is given, in pixels.
        root: Where paths begin in what is reported.
        workers: Processes that read images; by default one for each processor.

    Raises:
        UserError: A process that reads images has died.
    """
    start = time.perf_counter()
    samples = [(split, source, label) for split in get_args(SplitName) for source, label in getattr(splits, split)]
    names = [_name(name_of(source, splits.open_image, number), root) for number, (_, source, _) in enumerate(samples)]
    shortest = min(sides(image_size)) // _SHARE_OF_SIZE
    looks = _look_at_all(_Looks(splits, [source for _, source, _ in samples], shortest), workers)
    places = [(split, splits.classes[label]) for split, _, label in samples]
    findings = [*_single(names, looks), *_odd_modes(names, looks), *_twins(names, places, looks)]
    order, known = list(KINDS), lacking(splits)
    findings += [*_classes(splits), *(Finding("left_out", (), note) for note in splits.notes if note not in known)]
    formats = Counter(each.format or "none" for each in looks if each.size)
    return Checked(
        {split: _counts(splits, split) for split in get_args(SplitName)},
        len(samples),
        time.perf_counter() - start,
        dict(formats.most_common()),
        _sizes([each.size for each in looks if each.size]),
        tuple(sorted(findings, key=lambda finding: order.index(finding.kind))),
    )


def _name(path: str, root: Path | None) -> str:
    return os.path.relpath(path, root) if root and path.startswith(f"{root}{os.sep}") else path


def _look_at_all(dataset: _Looks, workers: int | None) -> list[Look]:
    count = processors() if workers is None else workers
    loader: DataLoader = DataLoader(dataset, batch_size=_AT_ONCE, num_workers=count, collate_fn=list)
    looks: list[Look] = []
    try:
        with _progress(len(dataset)) as progress:
            for several in loader:
                looks += several
                progress(len(several))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that read images died after {len(looks):,} of {len(dataset):,}; --workers 0 reads them here"
        ) from error
    return looks


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    console = Console(stderr=True)
    shown = (TextColumn("check"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*shown, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("check", total=total)
        yield lambda images: progress.advance(task, images)


def _single(names: Sequence[str], looks: Sequence[Look]) -> Iterator[Finding]:
    """What was seen of single images."""
    for name, each in zip(names, looks, strict=True):
        yield from (Finding(kind, (name,), detail) for kind, detail in each.faults)


def _odd_modes(names: Sequence[str], looks: Sequence[Look]) -> Iterator[Finding]:
    """Grey images where nearly all have colours, and the other way round."""
    modes = Counter(each.mode for each in looks if each.mode)
    if len(modes) == 2:
        (_, many), (rare, few) = modes.most_common()
        if few <= _RARE * (few + many):
            yield from (
                Finding("odd_mode", (name,), rare) for name, each in zip(names, looks, strict=True) if each.mode == rare
            )


def _twins(names: Sequence[str], places: Sequence[tuple[str, str]], looks: Sequence[Look]) -> Iterator[Finding]:
    """Images that are there twice, or nearly so."""
    groups = same([each.content for each in looks])
    for group in groups:
        found = _told_apart(group, places)
        for kind in [name for name, is_so in found.items() if is_so] or ["duplicate"]:
            yield Finding(kind, [names[place] for place in group], _where(group, places))
    again = {place for group in groups for place in group[1:]}
    seen = [place for place, each in enumerate(looks) if each.gradients is not None and place not in again]
    near = nearly_same(
        [looks[place].gradients or 0 for place in seen],
        [thumbnail for place in seen if (thumbnail := looks[place].thumbnail) is not None],
    )
    for numbers in near:
        group = [seen[number] for number in numbers]
        found = _told_apart(group, places)
        kind = "near_conflict" if found["label_conflict"] else "near_leak" if found["leak"] else "near_duplicate"
        yield Finding(kind, [names[place] for place in group], _where(group, places))


def _told_apart(group: Iterable[int], places: Sequence[tuple[str, str]]) -> dict[str, bool]:
    """Whether images that are the same are of several classes, and in several splits."""
    splits, labels = zip(*(places[place] for place in group), strict=True)
    return {"label_conflict": len(set(labels)) > 1, "leak": len(set(splits)) > 1}


def _where(group: Iterable[int], places: Sequence[tuple[str, str]]) -> str:
    return ", ".join(dict.fromkeys(f"{split} {label}" for split, label in (places[place] for place in group)))


def _classes(splits: Splits) -> Iterator[Finding]:
    """Classes that a split lacks, that have few images or many."""
    for split in ("val", "test"):
        if getattr(splits, split):
            yield from (
                Finding("class_gap", (name,), split) for name, count in _counts(splits, split).items() if not count
            )
    train = _counts(splits, "train")
    if not splits.train:
        return
    yield from (Finding("untrained_class", (name,)) for name, count in train.items() if not count)
    yield from (Finding("few_images", (name,), str(count)) for name, count in train.items() if 0 < count < _FEW)
    present = {name: count for name, count in train.items() if count}
    most, fewest = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
    if present[most] > _IMBALANCE * present[fewest]:
        yield Finding("imbalance", (most, fewest), f"{present[most]:,} and {present[fewest]:,}")


def _counts(splits: Splits, split: str) -> dict[str, int]:
    counts = Counter(label for _, label in getattr(splits, split))
    return {name: counts[label] for label, name in enumerate(splits.classes)}


def _sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, int, int]]:
    sides_of = {name: sorted(size[axis] for size in sizes) for axis, name in enumerate(("width", "height"))}
    return {name: (each[0], each[len(each) // 2], each[-1]) for name, each in sides_of.items() if each}
