"""What can be wrong with images, and how bad it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Kind:
    """One thing that can be found.

    Args:
        level: `error` where training would stop or a score would be wrong, `warning` where it may be, `note` where
            something is worth knowing.
        text: What it is, as a heading.
        advice: What to do about it.
    """

    level: Level
    text: str
    advice: str


KINDS: dict[str, Kind] = {
    "missing": Kind("error", "listed, and not there", "fetch them, or take them off the list"),
    "empty": Kind("error", "files without content", "fetch them anew"),
    "damaged": Kind("error", "images that break off or cannot be decoded", "fetch them anew"),
    "foreign": Kind("error", "no images, whatever their names end in", "remove them"),
    "too_large": Kind("error", "more pixels than Pillow opens", "shrink them"),
    "bad_values": Kind("error", "pixels that are no shades of grey", "rescale them to 0..1 or 0..255"),
    "label_conflict": Kind("error", "the same file under two classes", "keep the right one"),
    "leak": Kind("error", "the same file in two splits", "keep it in one"),
    "untrained_class": Kind("error", "classes without an image to train on", "add some, or leave the class out"),
    "near_conflict": Kind("warning", "nearly the same image under two classes", "look at them"),
    "near_leak": Kind("warning", "nearly the same image in two splits", "keep them in one"),
    "duplicate": Kind("warning", "the same file twice in one class and split", "keep one"),
    "near_duplicate": Kind("warning", "nearly the same image twice in one class and split", "keep one"),
    "class_gap": Kind("warning", "classes that val or test lacks", "its scores say nothing about them"),
    "few_images": Kind("warning", "classes with fewer than 5 images to train on", "add some"),
    "imbalance": Kind("warning", "classes with over 10 times the images of others", "set data.class_weights balanced"),
    "blank": Kind("warning", "images of a single shade", "look at them"),
    "tiny": Kind("warning", "sides shorter than an eighth of what the model is given", "larger ones say more"),
    "elongated": Kind("warning", "over 4 times as long as wide", "they are squeezed or cropped hard"),
    "hidden_pixels": Kind("warning", "transparency, which is put on white", "look at them with docs/data.md"),
    "more_frames": Kind("warning", "several frames or pages, of which the first is taken", "save those that matter"),
    "odd_mode": Kind("note", "grey among colours, or colours among grey", "see that it does not tell the class"),
    "huge": Kind("note", "over 25 megapixels, which take long to read", "shrink them once"),
    "deep": Kind("note", "over 8 bits a channel, which are scaled", "see docs/data.md for how"),
    "cmyk": Kind("note", "made for print (CMYK), with other colours on screen", "convert them with their profile"),
    "wrong_ending": Kind("note", "another format than the name ends in", "they are read all the same"),
    "turned": Kind("note", "turned as their EXIF note says", "nothing: they are read upright"),
    "left_out": Kind("note", "files that are not taken", "see that none of them matters"),
}
"""Every kind by its name, the worst first."""


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Args:
        kind: Its name in `KINDS`.
        items: The images, by path, or the classes that it is about.
        detail: More about it, in one line.
    """

    kind: str
    items: Sequence[str]
    detail: str = ""
