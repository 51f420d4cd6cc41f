"""A look at one image: can it be read, what is odd about it, and what to know it again by."""

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from snell_lightning.data.images import as_rgb, open_image_file, readable_formats, turn_of, upright, why_unreadable

_HUGE = 25_000_000
_LONG = 4
# Grey levels between the darkest and the brightest pixel; of a single shade a JPEG makes a few.
_SINGLE_SHADE = 8
_SIDE = 16
# Formats that a file may be in beside the one that its ending says, and still be what people expect.
_KIN = ({"JPEG", "MPO"}, {"AVIF", "HEIF"})


@dataclass(frozen=True)
class Look:
    """What was seen of one image.

    Args:
        faults: Names in `KINDS`, each with a detail.
        content: Hash of the file's bytes, or of the pixels where there is no file; empty if it cannot be read.
        gradients: Perceptual hash (dHash) of 64 bits; of a single shade there is none.
        thumbnail: Grey levels (16, 16), uint8, none of a single shade.
        size: Width and height in pixels.
        mode: Pillow's name of its kind of pixels, such as `RGB`.
        format: Pillow's name of its format, such as `JPEG`.
    """

    faults: tuple[tuple[str, str], ...]
    content: bytes = b""
    gradients: int | None = None
    thumbnail: NDArray[np.uint8] | None = None
    size: tuple[int, int] | None = None
    mode: str = ""
    format: str = ""


def look(source: Any, open_image: Callable[[Any], Image.Image], shortest: int) -> Look:
    """Look at an image as a model would see it, and at its file.

    Args:
        source: A path, or whatever `open_image` takes.
        open_image: Gives an RGB image, or raises if it cannot.
        shortest: Pixels that a side should have at least.
    """
    if isinstance(source, str) and open_image is open_image_file:
        return _look_at_file(source, shortest)
    try:
        image = open_image(source)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        return Look((("damaged", why_unreadable(error)),))
    return _described(image, image, hashlib.blake2b(image.tobytes(), digest_size=16).digest(), [], shortest)


def _look_at_file(path: str, shortest: int) -> Look:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return Look((("missing", ""),))
    except OSError as error:
        return Look((("damaged", error.strerror or str(error)),))
    if not data:
        return Look((("empty", ""),))
    content = hashlib.blake2b(data, digest_size=16).digest()
    faults: list[tuple[str, str]] = []
    try:
        with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # with its previews
                faults.append(("more_frames", f"{frames}"))
                image.seek(0)
            image.load()
            seen = as_rgb(upright(image))
            return _described(image, seen, content, faults + _of_file(path, image), shortest)
    except Exception as error:
        return Look(((_why(error), why_unreadable(error)),), content)


def _why(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "too_large"
    if isinstance(error, UnidentifiedImageError):
        return "foreign"
    # What `as_rgb` says of pixels.
    return "bad_values" if isinstance(error, ValueError) and "; expected " in str(error) else "damaged"


def _of_file(path: str, image: Image.Image) -> list[tuple[str, str]]:
    """What is odd about a file that can be read."""
    faults = []
    ending = os.path.splitext(path)[1].lower()
    expected = Image.registered_extensions().get(ending)
    if expected != image.format and not any({expected, image.format} <= kin for kin in _KIN):
        faults.append(("wrong_ending", f"{image.format}"))
    if turn_of(image) is not None:
        faults.append(("turned", ""))
    if image.mode[0] in "IF":
        faults.append(("deep", image.mode))
    if image.mode in ("CMYK", "YCCK"):
        faults.append(("cmyk", ""))
    if image.has_transparency_data and _hides(image):
        faults.append(("hidden_pixels", image.mode))
    return faults


def _hides(image: Image.Image) -> bool:
    """Whether some pixel is not opaque."""
    return bool(np.asarray(image.convert("RGBA"))[..., 3].min() < 255)


def _described(
    image: Image.Image, seen: Image.Image, content: bytes, faults: list[tuple[str, str]], shortest: int
) -> Look:
    width, height = seen.size
    if min(width, height) < shortest:
        faults.append(("tiny", f"{width} x {height}"))
    if max(width, height) > _LONG * min(width, height):
        faults.append(("elongated", f"{width} x {height}"))
    if width * height > _HUGE:
        faults.append(("huge", f"{width} x {height}"))
    grey = seen.convert("L")
    darkest, brightest = grey.getextrema()
    single = brightest - darkest <= _SINGLE_SHADE  # type: ignore[operator]
    if single:
        faults.append(("blank", ""))
    return Look(
        tuple(faults),
        content,
        None if single else _gradients(grey),
        None if single else np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BOX)),
        (width, height),
        _kind_of_pixels(image, seen),
        image.format or "",
    )


def _gradients(grey: Image.Image) -> int:
    """dHash: a bit for each of 8 x 8 places, whether the image gets brighter to the right there."""
    levels = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
    return int.from_bytes(np.packbits(levels[:, 1:] > levels[:, :-1]).tobytes(), "big")


def _kind_of_pixels(image: Image.Image, seen: Image.Image) -> str:
    """`grey` or `colour`, as it is seen: palettes and RGB may hold greys alone."""
    if image.mode in ("1", "L", "LA", "La") or image.mode[0] in "IF":
        return "grey"
    small = np.asarray(seen.resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    return "grey" if np.ptp(small, axis=2).max() <= _SINGLE_SHADE else "colour"
