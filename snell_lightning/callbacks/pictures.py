"""Pictures of an evaluation: who is taken for whom, and the images that go most wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_CLASSES = 100  # more cannot be told apart
_TILE = 150
_COLUMNS = 5
_TEXT = 12
_INK, _PAPER, _RED = (30, 30, 30), (255, 255, 255), (190, 30, 30)


@dataclass(frozen=True)
class Wrong:
    """An image that was taken for something else.

    Attributes:
        probability: Of the class that it was taken for.
        image: Its path, or its number in its split.
        label: What it is.
        taken_for: What it was taken for.
        source: What the data set opens it by; None where that is not known.
    """

    probability: float
    image: str
    label: int
    taken_for: int
    source: Any


def draw_confusion(classes: Sequence[str], matrix: NDArray[np.int64]) -> Image.Image | None:
    """A confusion matrix; None where there are too many classes to see.

    Args:
        classes: Their names.
        matrix: `(classes, classes)`, rows what an image is, columns what it is taken for.
    """
    count = len(classes)
    if count > _CLASSES:
        return None
    font = _font()
    side = max(14, min(44, 900 // count))
    names = [_cut(name, 22) for name in classes]
    margin = 16 + max(int(font.getlength(name)) for name in names)
    whole = Image.new("RGB", (margin + side * count + 10, 2 * _TEXT + margin + side * count), _PAPER)
    draw = ImageDraw.Draw(whole)
    draw.text((8, 6), "rows: what an image is; columns: what it is taken for", _INK, font)
    top = 2 * _TEXT + margin
    for column, name in enumerate(names):
        upright = Image.new("RGB", (margin - 8, _TEXT + 4), _PAPER)
        ImageDraw.Draw(upright).text((0, 0), name, _INK, font)
        whole.paste(upright.rotate(90, expand=True), (margin + column * side + (side - _TEXT) // 2, 2 * _TEXT + 4))
    for row, name in enumerate(names):
        draw.text((margin - 8, top + row * side + side // 2), name, _INK, font, anchor="rm")
        images = max(1, int(matrix[row].sum()))
        for column in range(count):
            value = int(matrix[row, column])
            left, upper = margin + column * side, top + row * side
            share = value / images
            shade = _mixed((40, 90, 160) if row == column else _RED, share**0.5)
            draw.rectangle((left, upper, left + side - 2, upper + side - 2), shade, (225, 225, 225))
            if value and side >= 20:
                ink = _PAPER if share > 0.4 else _INK
                draw.text((left + side // 2, upper + side // 2), f"{value}", ink, font, anchor="mm")
    return whole


def draw_wrong(
    classes: Sequence[str], wrong: Sequence[Wrong], open_image: Callable[[Any], Image.Image]
) -> Image.Image | None:
    """The most confidently wrong images with their paths; None where none can be opened.

    Args:
        classes: Names of the classes.
        wrong: The images, the worst first.
        open_image: Gives an image by its source.
    """
    font = _font()
    shown = [one for one in wrong if one.source is not None]
    if not shown:
        return None
    height = _TILE + 3 * (_TEXT + 4) + 8
    columns = min(_COLUMNS, len(shown))
    whole = Image.new("RGB", (columns * (_TILE + 40), -(-len(shown) // columns) * height), _PAPER)
    draw = ImageDraw.Draw(whole)
    for place, one in enumerate(shown):
        left, upper = place % columns * (_TILE + 40) + 6, place // columns * height + 4
        try:
            picture = open_image(one.source).convert("RGB")
        except Exception:  # gone since, or changed: its caption says what it was
            picture = Image.new("RGB", (8, 8), (230, 230, 230))
        # Small pictures are shown large, with their pixels.
        scale = _TILE / max(picture.size)
        how = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC
        size = tuple(max(1, round(edge * scale)) for edge in picture.size)
        whole.paste(picture.resize((size[0], size[1]), how), (left, upper))
        captions = (
            (_cut(one.image, 26, tail=True), _INK),
            (_cut(f"is {classes[one.label]}", 26), _INK),
            (_cut(f"taken for {classes[one.taken_for]}, {one.probability:.0%}", 26), _RED),
        )
        for line, (text, ink) in enumerate(captions):
            draw.text((left, upper + _TILE + 4 + line * (_TEXT + 4)), text, ink, font)
    return whole


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_TEXT)


def _cut(text: str, length: int, tail: bool = False) -> str:
    """A text of at most so many characters, all of which can be drawn."""
    text = text.encode("utf-8", "replace").decode().replace("\n", " ")
    if len(text) <= length:
        return text
    return f"...{text[-length + 3 :]}" if tail else f"{text[: length - 3]}..."


def _mixed(colour: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 + (value - 255) * share) for value in colour)
    return red, green, blue
