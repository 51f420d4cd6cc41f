"""The `webdataset` source: images in tar files, for sets of more files than a file system likes.

    train-000000.tar   n01440764_18.jpg  n01440764_18.cls  n01440764_37.jpg  n01440764_37.cls  ...
    val-000000.tar

Files of the same name up to the first dot belong together: an image, and its class in `.cls` (a number or a name) or
as `label` in `.json`. Where an image lies is found once, by the tar's headers, and kept in the user's cache; from then
on an image is read from its place. So any image can be had at any time: what several machines read, shuffled, and where
a run goes on is as exact as of a folder. Training goes through the shards a few at a time (`samplers.TrainSampler`), so
that a disk or a network reads nearly in a row.
"""

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from snell_lightning.adapters.errors import UserError
from snell_lightning.adapters.whole import user_cache, whole
from snell_lightning.data.folder import split_named
from snell_lightning.data.images import open_image_file, readable_endings
from snell_lightning.data.listing import folders_in
from snell_lightning.data.splits import Sample, SplitName, Splits, as_splits, lacking
from snell_lightning.data.table import in_order

_LAYOUT = (
    "expected ROOT/train-NUMBER.tar with val-NUMBER.tar and test-NUMBER.tar, or ROOT/train/NAME.tar and so on, each "
    "with NAME.jpg and its class in NAME.cls, or as label in NAME.json (github.com/webdataset)"
)
_READERS = 8
_OPEN = 32


class OpenMember:
    """Opens an image of a tar file, `(shard, name, offset, bytes)`.

    Args:
        shards: Paths of the tar files.
    """

    def __init__(self, shards: Sequence[str]) -> None:
        self.shards = tuple(shards)
        self._open: dict[int, io.FileIO] = {}

    def __call__(self, source: tuple[int, str, int, int]) -> Image.Image:
        """An RGB image."""
        shard, _, offset, size = source
        if (file := self._open.get(shard)) is None:
            while len(self._open) >= _OPEN:
                self._open.pop(next(iter(self._open))).close()
            file = self._open[shard] = io.FileIO(self.shards[shard])
        # Processes that were forked share the file's position.
        return open_image_file(io.BytesIO(os.pread(file.fileno(), size, offset)))

    def name(self, source: tuple[int, str, int, int]) -> str:
        """Shard and name."""
        return f"{self.shards[source[0]]}/{source[1]}"

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which stay in their process."""
        return {"shards": self.shards, "_open": {}}


def webdataset(
    root: Path | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    fixed: Mapping[str, SplitName] | None = None,
    classes: Any = None,
) -> Splits:
    """Images in shards; classes are their labels, sorted, by their value if all are whole numbers.

    Args:
        root: The folder with the tar files.
        val_fraction: Share that goes to val where there are no shards of val, in [0, 1).
        test_fraction: Share that goes to test where no shard says of which split it is, in [0, 1).
        seed: Seed of the split.
        fixed: Splits of single images, as an earlier call settled them.
        classes: The model's classes, where they are known: some of them may be missing here.

    Raises:
        UserError: There are no shards, one cannot be read, or an image has no class.
    """
    if root is None or not root.expanduser().is_dir():
        what = "data.source webdataset needs data.root" if root is None else f"there is no folder {root}"
        raise UserError(f"{what}; {_LAYOUT}")
    found = _shards(root.expanduser())
    if not found:
        raise UserError(f"{root} has no tar files; {_LAYOUT}")
    paths = [path for paths in found.values() for path in paths]
    with ThreadPoolExecutor(_READERS) as pool:
        indices = list(pool.map(_index, paths))
    labels = in_order({label for index in indices for label in index["labels"].tolist()})
    if len(labels) < (2 if classes is None else 1):
        raise UserError(f"the shards in {root} have {len(labels)} class(es); at least two are needed")
    numbers = {label: number for number, label in enumerate(labels)}
    samples: dict[str, dict[str, Sample]] = {}
    shard = 0
    for split, several in found.items():
        part = samples.setdefault(split, {})
        for path in several:
            rows = zip(*(indices[shard][name].tolist() for name in _FIELDS), strict=True)
            for key, offset, size, label in rows:
                part[f"{path.name}/{key}"] = ((shard, key, offset, size), numbers[label])
            shard += 1
    splits = as_splits(samples, tuple(labels), (val_fraction, test_fraction, seed), fixed)
    opener = OpenMember([str(path) for path in paths])
    return replace(splits, open_image=opener, notes=(*splits.notes, *lacking(splits)), in_shards=True)


_FIELDS = ("keys", "offsets", "sizes", "labels")


def _shards(root: Path) -> dict[str, list[Path]]:
    """The tar files by split; under "" where none says of which split it is.

    Raises:
        UserError: Some say so, and others do not.
    """
    found: dict[str, list[Path]] = {}
    for folder in (root, *folders_in(root)):
        for path in sorted(folder.glob("*.tar")):
            split = split_named(path.stem.rstrip("0123456789-_."))
            if split is None and folder != root:
                split = split_named(folder.name)
            found.setdefault(split or "", []).append(path)
    if "" in found and len(found) > 1:
        raise UserError(f"{found[''][0]} is of no split, and others are; {_LAYOUT}")
    return found


def _index(path: Path) -> dict[str, np.ndarray]:
    """Where the images of a shard lie, and their labels; from the cache if the file is as it was."""
    status = path.stat()
    told = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode(errors="surrogateescape")
    name = f"{blake2b(told, digest_size=16).hexdigest()}.npz"
    try:
        with np.load(user_cache() / "shards" / name) as arrays:
            return {field: arrays[field] for field in _FIELDS}
    except (OSError, ValueError, KeyError):
        index = _read_index(path)
    # Without a cache it is read again the next time.
    with contextlib.suppress(OSError), whole(user_cache() / "shards" / name) as part, part.open("wb") as file:
        np.savez_compressed(file, **index)  # type: ignore[arg-type]  # the stubs take a field for an option
    return index


def _read_index(path: Path) -> dict[str, np.ndarray]:
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    try:
        # Compressed ones have no places to read from.
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, name = os.path.split(member.name)
                stem, _, ending = name.partition(".")
                if not member.isfile() or not stem:
                    continue
                key, ending = os.path.join(folder, stem), f".{ending.lower()}"
                if ending in readable_endings():
                    images[key] = (member.offset_data, member.size)
                elif ending in (".cls", ".json"):
                    content = archive.extractfile(member)
                    if content is not None and (label := _label(ending, content.read())):
                        labels[key] = label
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a whole, uncompressed tar file with labels as expected ({reason})") from error
    if absent := [key for key in images if key not in labels]:
        raise UserError(f"{len(absent):,} of the {len(images):,} images in {path} have no class, such as {absent[0]}")
    if not images:
        raise UserError(f"{path} holds no image; {_LAYOUT}")
    keys = sorted(images, key=images.__getitem__)
    places = np.array([images[key] for key in keys], dtype=np.int64)
    return {
        "keys": np.array(keys),
        "offsets": places[:, 0],
        "sizes": places[:, 1],
        "labels": np.array([labels[key] for key in keys]),
    }


def _label(ending: str, content: bytes) -> str | None:
    if ending == ".cls":
        return content.decode().strip()
    said = json.loads(content)
    label = said.get("label") if isinstance(said, dict) else None
    return None if label is None else str(label)
