"""The same image on both sides of a split: found by content, without reading more than has to be read."""

import hashlib
import os
from collections.abc import Iterable, Sequence

_MOST = 20_000
_PART = 16_384


def shared_images(train: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of files of the same content, one to train on and one to evaluate on.

    Files are compared by size, then by a hash of their start, then by a hash of the whole. Of more than 20,000 files
    to evaluate on, as many are looked at, evenly spread.

    Args:
        train: Paths of the training images.
        others: Paths of the images of val and test.

    Returns:
        For each file of `others` that is in `train` too, the training file and it. Files that cannot be read are left
        out.
    """
    step = max(1, -(-len(others) // _MOST))
    looked_at = [path for path in others[::step] if _size(path)]
    sizes = {_size(path) for path in looked_at}
    candidates = [path for path in train if _size(path) in sizes]
    sizes &= {_size(path) for path in candidates}
    looked_at = [path for path in looked_at if _size(path) in sizes]
    for length in (_PART, None):
        known = _by_content(candidates, length)
        mine = {path: content for path in looked_at if (content := _content(path, length)) in known}
        looked_at = list(mine)
        wanted = set(mine.values())
        candidates = [path for content, paths in known.items() if content in wanted for path in paths]
    return [(known[content][0], path) for path, content in mine.items()]


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _by_content(paths: Iterable[str], length: int | None) -> dict[tuple[int, bytes], list[str]]:
    known: dict[tuple[int, bytes], list[str]] = {}
    for path in paths:
        if (content := _content(path, length)) is not None:
            known.setdefault(content, []).append(path)
    return known


def _content(path: str, length: int | None) -> tuple[int, bytes] | None:
    """Size and hash of a file's first bytes, or of all of them."""
    try:
        with open(path, "rb") as file:
            return _size(path), hashlib.blake2b(file.read(length or -1)).digest()
    except OSError:
        return None
