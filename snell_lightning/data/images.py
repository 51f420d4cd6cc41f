"""From an image file to the RGB image that a person sees: any format Pillow reads, turned upright, of 8 bits.

Phones store photographs as the sensor saw them, with a note (EXIF) on how they are to be turned. Cut-outs have hidden
pixels under their transparency. Microscopes and scanners write 12 or 16 bits or floats, which Pillow's own conversion
would clip to black or white. Here the note is followed, transparency is put on white, and deep images are scaled by
their range.
"""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# Formats that Pillow knows without being able to decode them, and PostScript, for which it would run another program.
_NOT_READ = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"})
_FREQUENT = ("JPEG", "PNG")
_ORIENTATION = 0x0112  # EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Bits that sensors and file formats have; an image is taken to have the fewest that hold its brightest pixel.
_DEPTHS = (8, 10, 12, 14, 16, 24, 31)


@cache
def readable_formats() -> tuple[str, ...]:
    """Names of the formats that the installed Pillow decodes, with those of pillow-heif where it is installed."""
    if find_spec("pillow_heif"):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    # They are tried in this order.
    return tuple(sorted(set(Image.OPEN) - _NOT_READ, key=lambda name: (name not in _FREQUENT, name)))


@cache
def readable_endings() -> frozenset[str]:
    """Endings of files in those formats, in lower case with their dot."""
    formats = {*readable_formats(), "MPO"}  # which the JPEG reader takes
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def open_image_file(path: str | Path | BinaryIO) -> Image.Image:
    """Read a whole image file as RGB; of an animation or of several pages the first.

    Raises:
        Exception: Whatever Pillow raises for a missing, truncated, oversized or foreign file, or a `ValueError` that
            says which values an image has that are no shades of grey.
    """
    with Image.open(path, formats=readable_formats()) as image:
        image.load()
        return as_rgb(upright(image))


def why_unreadable(error: Exception) -> str:
    """Why an image could not be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a format that PIL knows"
    return " ".join(str(error).split()) or type(error).__name__


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """How an image is to be turned by its EXIF note; None for not at all, and where the note cannot be read."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata does not make the pixels unreadable, and raises whatever it happens to
        return None


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF note says."""
    turn = turn_of(image)
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in 8-bit RGB, transparency on white, deep grey levels scaled by their range.

    Raises:
        ValueError: Its pixels are floats outside 0 to 255, negative or not numbers.
    """
    if image.mode[0] in "IF":
        return _from_deep_grey(image).convert("RGB")
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        opaque = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(opaque, image.convert("RGBA")).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """An image of one channel of integers or floats, as 8-bit grey."""
    pixels = np.asarray(image)
    if image.mode == "F":
        grey = _from_floats(pixels)
    else:
        brightest = int(pixels.max(initial=0))
        if pixels.min(initial=0) < 0:
            raise ValueError(
                f"grey levels from {pixels.min()} to {brightest}; expected none below 0: shift them, or save 8 bits"
            )
        full = 2 ** next(depth for depth in _DEPTHS if brightest < 2**depth) - 1
        grey = np.round(pixels.astype(np.float64) * (255 / full)).astype(np.uint8)
    hidden = image.info.get("transparency")
    if isinstance(hidden, int):
        grey[pixels == hidden] = 255
    return Image.fromarray(grey)


def _from_floats(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Floats from 0 to 1, or from 0 to 255, as 8-bit grey levels."""
    if not np.isfinite(pixels).all():
        raise ValueError("float pixels that are not numbers; expected 0 to 1")
    lowest, highest = float(pixels.min(initial=0)), float(pixels.max(initial=0))
    if lowest < 0 or highest > 255:
        raise ValueError(f"float pixels from {lowest:.4g} to {highest:.4g}; expected 0 to 1, or 0 to 255: rescale them")
    return np.round(pixels.astype(np.float64) * (255 if highest <= 1 else 1)).astype(np.uint8)
