"""`predict --adapter FILE --images PATH... --output FILE`: the classes of many images, in a table.

One process lists the images and plans the parts (`parts.py`); it, or the processes that it starts, one a device, makes
those that are missing. Every part is in place or not there, so the same command line goes on wherever it was stopped.
"""

import hashlib
import multiprocessing
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from snell_lightning.adapters import UserError, read_adapter
from snell_lightning.arguments import tell
from snell_lightning.data.dataset import processors
from snell_lightning.data.images import open_image_file, why_unreadable
from snell_lightning.data.transforms import Transform
from snell_lightning.inference.classifier import Classifier, load_classifier
from snell_lightning.inference.listing import list_images
from snell_lightning.inference.parts import Parts
from snell_lightning.inference.pictures import default_device
from snell_lightning.inference.tables import Columns, Row, as_key, table_for

# Images of a part: what is lost at most, for each process, when it is stopped.
_PART = 256
_PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

Report = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """What is to be predicted.

    Attributes:
        adapters: Adapter files; each classifies every image.
        images: Folders, files and patterns.
        output: The table, in the format that its ending names.
        top_k: Classes to name.
        embeddings: Write pooled features instead.
        batch_size: Images at once on a device.
        num_workers: Processes that read images, on each device; None: up to 8 beside an accelerator, none beside a CPU.
        devices: Devices, each with a process of its own.
        precision: `32-true`, `bf16-mixed` or `16-mixed`.
        on_bad_image: `skip` writes why an image could not be read; `error` stops there.
        weights: Where the backbone's weights are, if not where the adapter files say.
    """

    adapters: Sequence[str]
    images: Sequence[str]
    output: str
    top_k: int = 5
    embeddings: bool = False
    batch_size: int = 64
    num_workers: int | None = None
    devices: int = 1
    precision: str = "32-true"
    on_bad_image: str = "skip"
    weights: str | None = None


def predict_images(job: Job) -> None:
    """Do it, or what is left to do of it.

    Raises:
        UserError: A value is out of range, a file is missing or does not fit, or no image can be read.
    """
    _check(job)
    output = Path(job.output)
    table = table_for(output)
    # Of several processes each makes its own; this one only looks at what it gives.
    device = _device(0, 1) if job.devices == 1 else torch.device("cpu")
    first = load_classifier(job.adapters[0], device, job.adapters[0], job.weights)
    columns = _columns(job, first)
    parts = Parts(output, table, columns, _settings(job))
    with parts.locked():
        _predict(job, parts, first)


def _predict(job: Job, parts: Parts, first: Classifier) -> None:
    """What is left to do of an output that no other process writes."""
    output, table, several = parts.output, parts.table, parts.columns.several
    if resumed := parts.resume():
        left = sum(len(parts.images(part)) for part in parts.missing)
        tell(f"predict: {output} goes on, with {left:,} of {len(parts.tasks):,} images left")
        _finish(job, parts, first)
    images, notes = list_images(job.images)
    for note in notes:
        tell(f"predict: {note}")
    done = parts.done_before()
    names = [job.adapters[number] if several else "" for number in range(len(job.adapters))]
    tasks = [
        (number, image)
        for number in range(len(job.adapters))
        for image in images
        if (as_key(table, image), as_key(table, names[number])) not in done
    ]
    if not tasks:
        if not resumed:
            tell(f"predictions: {output} has all {len(images):,} images already")
        return
    if done:
        tell(f"predict: {len(images) * len(names) - len(tasks):,} rows are in {output} already, {len(tasks):,} are not")
    parts.begin(tasks, max(1, _PART // job.batch_size) * job.batch_size)
    _finish(job, parts, first)


def _finish(job: Job, parts: Parts, first: Classifier) -> None:
    """Make the missing parts and put them all together."""
    missing = parts.missing
    left = sum(len(parts.images(part)) for part in missing)
    begun = time.monotonic()
    with _progress(left) as report:
        if job.devices == 1:
            _make(job, parts, missing, first, report)
        elif missing:
            _make_in_processes(job, parts, missing, report)
    seconds = time.monotonic() - begun
    total, unreadable = len(parts.tasks), parts.unreadable
    if total == unreadable and parts.is_first:
        parts.drop()
        path = parts.tasks[0][1]
        raise UserError(f"none of the {total:,} images could be read, such as {path}: {_why_not(path)}")
    parts.join()
    bad = f", {unreadable:,} unreadable" if unreadable else ""
    speed = f", {left / seconds:,.0f} images a second" if left else ""
    tell(f"predictions: {parts.output} ({total:,} rows{bad}{speed})")


def _make(job: Job, parts: Parts, numbers: Sequence[int], classifier: Classifier, report: Report) -> None:
    """Make parts, those of one adapter after those of the other, which share the frozen weights."""
    for place, adapter in enumerate(job.adapters):
        own = [number for number in numbers if parts.adapter(number) == place]
        if not own:
            continue
        if not parts.columns.several:
            classifier.merge()
        elif adapter in classifier.adapters:
            classifier.set_adapter(adapter)
        else:
            classifier.load_adapter(adapter, adapter)
        _classify(job, parts, own, classifier, report)


def _classify(job: Job, parts: Parts, numbers: Sequence[int], classifier: Classifier, report: Report) -> None:
    images = [image for number in numbers for image in parts.images(number)]
    batches: list[list[int]] = []
    for number in numbers:
        start = sum(map(len, batches))
        stop = start + len(parts.images(number))
        batches += [list(range(at, min(at + job.batch_size, stop))) for at in range(start, stop, job.batch_size)]
    loader = iter(_loader(_Images(images, classifier.transform), batches, job, classifier.device))
    adapter = job.adapters[parts.adapter(numbers[0])] if parts.columns.several else ""
    for number in numbers:
        rows: list[Row] = []
        expected = parts.images(number)
        while len(rows) < len(expected):
            pictures, errors = next(loader)
            if job.on_bad_image == "error" and (bad := next(filter(None, errors), None)):
                image = expected[len(rows) + errors.index(bad)]
                raise UserError(f"cannot read image {image}: {bad}; remove it, or leave --on_bad_image error out")
            found = iter(_values_of(job, classifier, pictures))
            names = expected[len(rows) : len(rows) + len(errors)]
            rows += [
                Row(name, adapter, (), (), error) if error else Row(name, adapter, *next(found), "")
                for name, error in zip(names, errors, strict=True)
            ]
            report(len(errors))
        parts.write(number, rows)


def _values_of(job: Job, classifier: Classifier, images: Tensor) -> list[tuple[tuple[str, ...], tuple[float, ...]]]:
    """Labels and probabilities of each image, or no labels and its features."""
    if not len(images):
        return []
    kind = _PRECISIONS[job.precision]
    with torch.autocast(classifier.device.type, kind or torch.bfloat16, enabled=kind is not None):
        if job.embeddings:
            return [((), tuple(row)) for row in classifier.features(images).tolist()]
        probabilities = classifier.probabilities(images)
    return [(found.labels, found.probabilities) for found in classifier.top(probabilities, job.top_k)]


class _Images(Dataset):
    """Images by their place, transformed, or why they cannot be read."""

    def __init__(self, paths: Sequence[str], transform: Transform) -> None:
        self.paths, self.transform = paths, transform

    def __getitem__(self, place: int) -> Tensor | str:
        try:
            image = open_image_file(self.paths[place])
        except Exception as error:  # PIL's decoders raise whatever a broken file leads them to
            return why_unreadable(error)
        return self.transform(image)


def _why_not(path: str) -> str:
    """Why an image cannot be read."""
    found = _Images([path], lambda _: torch.zeros(0))[0]
    return found if isinstance(found, str) else "it can be read now"


def _collate(items: Sequence[Tensor | str]) -> tuple[Tensor, list[str]]:
    """The images that could be read, and for each item why it could not, or nothing."""
    read = [item for item in items if isinstance(item, Tensor)]
    return torch.stack(read) if read else torch.zeros(0), [item if isinstance(item, str) else "" for item in items]


def _loader(images: _Images, batches: list[list[int]], job: Job, device: torch.device) -> DataLoader:
    workers = job.num_workers
    if workers is None:
        workers = 0 if device.type == "cpu" else max(1, min(8, processors() // job.devices))
    pinned = device.type != "cpu"
    return DataLoader(images, batch_sampler=batches, num_workers=workers, collate_fn=_collate, pin_memory=pinned)


def _make_in_processes(job: Job, parts: Parts, numbers: Sequence[int], report: Report) -> None:
    """Make parts in as many processes as there are devices.

    Raises:
        UserError: One of them failed; what the others had done by then is kept.
    """
    context = multiprocessing.get_context("spawn")
    told: Any = context.Queue()
    shares = [numbers[place :: job.devices] for place in range(job.devices)]
    processes = [
        context.Process(target=_process, args=(job, parts, share, place, os.getpid(), told))
        for place, share in enumerate(shares)
        if share
    ]
    # A signal that ends this process ends the others with it.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes) or not told.empty():
            try:
                value = told.get(timeout=0.2)
            except queue.Empty:
                value = 0
            if isinstance(value, BaseException):
                raise value
            report(value)
            if failed := [process.exitcode for process in processes if process.exitcode]:
                raise UserError(
                    f"one of the {len(processes)} processes ended with status {failed[0]}; what is done is kept: the "
                    "same command goes on"
                )
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
        signal.signal(signal.SIGTERM, before)


def _process(job: Job, parts: Parts, numbers: Sequence[int], place: int, parent: int, told: Any) -> None:
    """One of several processes: make a share of the parts, and tell the first process how far it is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    device = _device(place, job.devices)
    if device.type == "cpu":
        torch.set_num_threads(max(1, processors() // job.devices))

    def report(images: int) -> None:
        if os.getppid() != parent:
            sys.exit(1)
        told.put(images)

    try:
        _make(job, parts, numbers, load_classifier(job.adapters[0], device, job.adapters[0], job.weights), report)
    except UserError as error:
        told.put(error)


def _device(place: int, devices: int) -> torch.device:
    """The device of a process.

    Raises:
        UserError: There are not as many.
    """
    device = default_device()
    if device.type == "cpu":
        return device
    count = torch.accelerator.device_count()
    if devices > count:
        raise UserError(f"--devices {devices}, and there are {count} of type {device.type}")
    return torch.device(device.type, place)


def _check(job: Job) -> None:
    for name in ("top_k", "batch_size", "devices"):
        if getattr(job, name) < 1:
            raise UserError(f"--{name} is {getattr(job, name)}; expected at least 1")
    if job.num_workers is not None and job.num_workers < 0:
        raise UserError(f"--num_workers is {job.num_workers}; expected at least 0")
    if len(set(job.adapters)) < len(job.adapters):
        raise UserError("--adapter names a file twice")
    if job.embeddings and len(job.adapters) > 1:
        raise UserError("--embeddings goes with one adapter")
    _device(0, job.devices)


def _settings(job: Job) -> dict[str, Any]:
    """What an output depends on, by which one that was made otherwise is known."""
    sums = [hashlib.sha256(Path(adapter).read_bytes()).hexdigest() for adapter in job.adapters]
    several = {"adapters": list(job.adapters)} if len(job.adapters) > 1 else {}
    values = {"embeddings": True} if job.embeddings else {"top_k": job.top_k}
    return {**several, "sha256": sums, **values, "precision": job.precision}


def _columns(job: Job, first: Classifier) -> Columns:
    if job.embeddings:
        blank = torch.zeros(1, 3, *first.image_size)
        return Columns(first.features(blank).shape[1], True, False)
    most = max(len(read_adapter(adapter)[1].get("classes", ())) for adapter in job.adapters)
    return Columns(min(job.top_k, most), False, len(job.adapters) > 1)


@contextmanager
def _progress(total: int) -> Iterator[Report]:
    """A bar with images a second, where somebody sees it."""
    console = Console(stderr=True)
    shown = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn()]
    with Progress(*shown, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("predict", total=total)
        yield lambda images: progress.advance(task, images)


class _Speed(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} images/s" if task.speed else "")
