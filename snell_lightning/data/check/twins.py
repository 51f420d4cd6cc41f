"""Which images are the same, and which are nearly so.

Nearly the same are two images whose perceptual hashes (dHash) differ in at most three of 64 bits and whose thumbnails,
brought to the same brightness and contrast, differ little in every place: copies that were saved, scaled or brightened
anew. Of hashes that differ in three bits at most, one of four parts of 16 bits is equal: only images that share a part
are compared, so that the work does not grow with the square of their number.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_BITS = 3
_PARTS = 4
# In standard deviations of the thumbnail's grey levels, at the place where two differ most.
_DIFFERENCE = 0.4
_SET_BITS = np.array([bin(value).count("1") for value in range(2**16)], dtype=np.uint8)


def same(contents: Sequence[bytes]) -> list[list[int]]:
    """Groups of at least two places whose contents are equal; empty ones are like no other."""
    places: dict[bytes, list[int]] = {}
    for place, content in enumerate(contents):
        if content:
            places.setdefault(content, []).append(place)
    return [group for group in places.values() if len(group) > 1]


def nearly_same(gradients: Sequence[int], thumbnails: Sequence[NDArray[np.uint8]]) -> list[list[int]]:
    """Groups of at least two places whose images are nearly the same, directly or by way of others.

    Args:
        gradients: Perceptual hashes of 64 bits.
        thumbnails: Grey levels (side, side), uint8, not all the same.
    """
    if len(gradients) < 2:
        return []
    hashes = np.array(gradients, dtype=np.uint64)
    levels = np.stack(thumbnails).reshape(len(hashes), -1)
    leader = np.arange(len(hashes))
    for part in range(_PARTS):
        keys = (hashes >> np.uint64(16 * part)) & np.uint64(0xFFFF)
        for bucket in _buckets(keys):
            for place, others in _close(hashes, levels, bucket):
                for other in others:
                    _join(leader, place, int(other))
    groups: dict[int, list[int]] = {}
    for place in range(len(hashes)):
        groups.setdefault(_find(leader, place), []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _buckets(keys: NDArray[np.uint64]) -> Iterator[NDArray[np.int64]]:
    """Places of equal keys, where there are several."""
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(np.diff(keys[order])) + 1
    yield from (bucket for bucket in np.split(order, edges) if len(bucket) > 1)


def _close(
    hashes: NDArray[np.uint64], levels: NDArray[np.uint8], bucket: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each place of a bucket with those behind it that are nearly the same."""
    for number, place in enumerate(bucket[:-1]):
        others = bucket[number + 1 :]
        differing = (hashes[others] ^ hashes[place]).view(np.uint16).reshape(len(others), 4)
        others = others[_SET_BITS[differing].sum(1) <= _BITS]
        if len(others):
            distance = np.abs(_even(levels[others]) - _even(levels[place][None])).max(1)
            others = others[distance <= _DIFFERENCE]
        if len(others):
            yield int(place), others


def _even(levels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Thumbnails (count, pixels) of mean 0 and standard deviation 1."""
    values = levels.astype(np.float32)
    values -= values.mean(1, keepdims=True)
    return values / np.maximum(values.std(1, keepdims=True), 1.0)


def _find(leader: NDArray[np.int64], place: int) -> int:
    while leader[place] != place:
        leader[place] = leader[leader[place]]
        place = int(leader[place])
    return place


def _join(leader: NDArray[np.int64], one: int, other: int) -> None:
    one, other = _find(leader, one), _find(leader, other)
    leader[max(one, other)] = min(one, other)
