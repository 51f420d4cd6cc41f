"""From samples to batches, and what becomes of images that cannot be read.

An unreadable image travels through the worker as an `UnreadableImage` beside the batch instead of as an
exception: torch would bury an exception's text in the worker's traceback, and a count kept inside a worker
would be lost. The `ImageLoader`, in the main process, takes them off the batch and raises, counts or notes them.

    worker:  dataset[i] -> (tensor, label) | UnreadableImage ; collate -> (images, labels, unreadable)
    main:    ImageLoader -> raise UserError, or count, or note; yields (images, labels)
"""

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from snell_lightning.adapters.errors import UserError
from snell_lightning.backbones.sizes import ImageSize, sides
from snell_lightning.data.images import why_unreadable
from snell_lightning.data.samplers import ShardSampler, TrainSampler
from snell_lightning.data.splits import Sample, name_of
from snell_lightning.data.transforms import Transform

_PATHS_NAMED = 3

_log = logging.getLogger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor]
"""Images (batch, 3, height, width), float32, and labels (batch,), int64."""


OnUnreadable = Literal["error", "skip", "mark"]


@dataclass(frozen=True)
class UnreadableImage:
    """An image that could not be opened, and why, in one line.

    Args:
        index: Its place in the data set.
        label: The label it would have had.
        path: What was to be opened.
        reason: Why it could not be.
    """

    index: int
    label: int
    path: str
    reason: str


class ImageDataset(Dataset):
    """Samples of one split, opened and transformed on access.

    Args:
        samples: Pairs of what `open_image` takes and the label.
        open_image: Gives an RGB image, or raises if it cannot.
        transform: From an RGB image to a tensor (3, height, width).
        split: The split's name, for messages.
        on_unreadable: What to do about an image that cannot be read: `error` raises, `skip` leaves it out of its batch
            and counts it, `mark` puts pixels that are not numbers in its place, so that no index shifts.
        seed: Of what the transform draws at random; None if it draws nothing.

    An image's number is its index, plus the number of images for each epoch that went before. What is drawn for it
    depends on seed and number alone: neither on the worker that opens it nor on what was opened before.

    Attributes:
        unreadable: Why an image could not be read, by its index, for those met so far.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        open_image: Callable[[Any], Image.Image],
        transform: Transform,
        split: str,
        on_unreadable: OnUnreadable = "error",
        seed: int | None = None,
    ) -> None:
        self.samples = samples
        self.open_image = open_image
        self.transform = transform
        self.split = split
        self.on_unreadable = on_unreadable
        self.seed = seed
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def name(self, index: int) -> str:
        """What an image is called: its path, if it has one."""
        return name_of(self.samples[index][0], self.open_image, index)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int] | UnreadableImage:
        """The transformed image (3, height, width) and its label, or the note that it cannot be read."""
        index = number % len(self.samples)
        source, label = self.samples[index]
        try:
            image = self.open_image(source)
        except Exception as error:  # PIL's decoders raise whatever a broken file leads them to
            return UnreadableImage(index, label, self.name(index), why_unreadable(error))
        if self.seed is None:
            return self.transform(image), label
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(random.Random(f"{self.seed} {number}").getrandbits(63))
            return self.transform(image), label


class ImageLoader(DataLoader):
    """A loader of `(images, labels)` that deals with unreadable images in the main process.

    With a `ShardSampler` every process yields equally many batches, the last of which may be short or even
    empty on
    some: sharded weights and synchronised buffers need every process to take part in every forward pass.

    It has no constructor of its own, because lightning builds loaders anew from `DataLoader`'s arguments; use
    `image_loader`.

    Raises:
        UserError: An image cannot be read and the data set does not skip such images.
    """

    dataset: ImageDataset

    def __len__(self) -> int:
        """Number of batches, the same on every process."""
        sampler = getattr(self.batch_sampler, "sampler", None)
        if not isinstance(sampler, ShardSampler):
            return super().__len__()
        return -(-sampler.longest_shard // self.batch_sampler.batch_size)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """One pass over the images of this process, without the unreadable ones, filled up with empty batches.

        Nothing starts before the first batch is asked for: lightning makes the iterator before it sets the epoch,
        and workers that start then would fetch the order of epoch 0, whatever the epoch that is resumed.
        """
        batches = super().__iter__()
        skipped: list[UnreadableImage] = []
        sampler = self.sampler if isinstance(self.sampler, TrainSampler) else None
        if sampler is not None:
            sampler.taken = 0
        last = self._left() - 1
        try:
            for number in range(last + 1):
                images, labels, unreadable = next(batches, None) or self._empty_batch()
                if sampler is not None:
                    sampler.taken += self._at_once(sampler)
                self.dataset.unreadable |= {image.index: image.reason for image in unreadable}
                if unreadable and self.dataset.on_unreadable == "error":
                    raise UserError(
                        f"cannot read image {unreadable[0].path}: {unreadable[0].reason}; "
                        "remove it or set data.on_bad_image to skip"
                    )
                skipped += unreadable
                if number == last:  # lightning takes the last batch without asking for another
                    self._report(skipped)
                yield images, labels
        except Exception:
            # Its workers end here, and not whenever an error that holds on to this frame is let go.
            self.close()
            raise
        finally:
            self._report(skipped)

    def close(self) -> None:
        """End the worker processes, whoever else still holds on to the iterator that they belong to."""
        iterator, self._iterator = self._iterator, None
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()

    def state_dict(self) -> dict[str, Any]:
        """Where in the epoch this is, in images over all processes; nothing of a loader that is not trained from."""
        sampler = self.sampler
        if not isinstance(sampler, TrainSampler):
            return {}
        return {"epoch": sampler.epoch, "images": min(sampler.done + sampler.taken, sampler.images)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a loader was, whatever its batches and processes were."""
        sampler = self.sampler
        if isinstance(sampler, TrainSampler) and state_dict:
            sampler.set_epoch(state_dict["epoch"])
            sampler.done = state_dict["images"]

    def batches_done(self) -> int:
        """Batches of the epoch that were done before this loader took over."""
        return len(self) - self._left()

    def _left(self) -> int:
        """Batches that a pass has from here."""
        sampler = self.sampler
        if not isinstance(sampler, TrainSampler):
            return len(self)
        return -(-(sampler.images - sampler.done) // self._at_once(sampler))

    def _at_once(self, sampler: TrainSampler) -> int:
        """Images of a batch over all processes."""
        return sampler.num_replicas * (self.batch_size or 1)

    def _empty_batch(self) -> Any:
        # Lightning's predict loop looks up the indices of each batch here.
        getattr(self.batch_sampler, "seen_batch_indices", []).append([])
        return self.collate_fn([])

    def _report(self, skipped: list[UnreadableImage]) -> None:
        """Say once per pass what this process left out."""
        if not skipped:
            return
        paths = ", ".join(image.path for image in skipped[:_PATHS_NAMED])
        more = ", ..." if len(skipped) > _PATHS_NAMED else ""
        verb = "found" if self.dataset.on_unreadable == "mark" else "skipped"
        message = f"{verb} {len(skipped)} unreadable image(s) of {self.dataset.split}: {paths}{more}"
        sampler = getattr(self.batch_sampler, "sampler", None)
        _log.warning(f"[rank {getattr(sampler, 'rank', 0)}] {message}")
        skipped.clear()


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def image_loader(
    dataset: ImageDataset,
    sampler: Sampler,
    batch_size: int,
    image_size: ImageSize,
    num_workers: int,
    pin_memory: bool = False,
) -> ImageLoader:
    """Build the loader of one split.

    Args:
        dataset: The split's images.
        sampler: Which of them this process takes, and in which order.
        batch_size: Images per batch and process.
        image_size: Of the transformed images, in pixels.
        num_workers: Worker processes; 0 loads in the main process.
        pin_memory: Put batches where a copy to an accelerator is fast.
    """
    return ImageLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=partial(_collate, size=sides(image_size), mark=dataset.on_unreadable == "mark"),
        pin_memory=pin_memory,
        # Between epochs they wait: what an image is depends on its number alone.
        persistent_workers=num_workers > 0,
        # Of its own, so that starting a pass draws nothing from the run's.
        generator=torch.Generator(),
    )


def _collate(
    items: Sequence[tuple[torch.Tensor, int] | UnreadableImage], size: tuple[int, int], mark: bool = False
) -> tuple[torch.Tensor, torch.Tensor, tuple[UnreadableImage, ...]]:
    """Stack what could be read, or with `mark` NaN for the rest; images (0, 3, height, width) if nothing."""
    unreadable = tuple(item for item in items if isinstance(item, UnreadableImage))
    nothing = torch.full((3, *size), torch.nan)
    read = [
        (nothing, item.label) if isinstance(item, UnreadableImage) else item
        for item in items
        if mark or not isinstance(item, UnreadableImage)
    ]
    labels = torch.tensor([label for _, label in read], dtype=torch.long)
    if not read:
        return torch.zeros(0, 3, *size), labels, unreadable
    return torch.stack([image for image, _ in read]), labels, unreadable
