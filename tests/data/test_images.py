"""Image files of every kind that people have come out as what a person sees."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snell_lightning.data.images import open_image_file, readable_endings

# A grey ramp of 16 levels, as 8 bits.
RAMP = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4)


def saved(path: Path, image: Image.Image, **options: object) -> np.ndarray:
    """Red, green and blue of an image after it was written and read, of shape (height, width, 3)."""
    image.save(path, **options)
    return np.asarray(open_image_file(path))


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a4_images_are_turned_as_exif_says(tmp_path: Path, ending: str, orientation: int) -> None:
    upright = Image.new("RGB", (32, 16))
    upright.paste((255, 255, 255), (0, 0, 8, 8))
    # How a camera stores it: the inverse of the turn that EXIF's value stands for.
    stored = {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_270],
    }[orientation]  # fmt: skip
    image = upright
    for turn in stored:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = saved(tmp_path / f"a.{ending}", image, exif=exif, quality=100)
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels.astype(int) - np.asarray(upright)).max() < 40


def test_a4_damaged_exif_does_not_make_an_image_unreadable(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert open_image_file(tmp_path / "a.jpg").size == (8, 8)


@pytest.mark.parametrize(
    ("ending", "make"),
    [
        ("png", lambda ramp: Image.fromarray(ramp.astype(np.uint16) * 257)),
        ("tif", lambda ramp: Image.fromarray(ramp.astype(np.uint16) * 257)),
        ("png", lambda ramp: Image.fromarray(np.round(ramp * (4095 / 255)).astype(np.uint16))),
        ("tif", lambda ramp: Image.fromarray(np.round(ramp * (1023 / 255)).astype(np.uint16))),
        ("pgm", lambda ramp: Image.fromarray(ramp.astype(np.uint16) * 257)),
        ("tif", lambda ramp: Image.fromarray(ramp.astype(np.int32))),
        ("tif", lambda ramp: Image.fromarray(ramp.astype(np.int32) * 257)),
        ("tif", lambda ramp: Image.fromarray((ramp * ((2**31 - 1) / 255)).astype(np.int32))),
        ("tif", lambda ramp: Image.fromarray((ramp / 255).astype(np.float32))),
        ("tif", lambda ramp: Image.fromarray(ramp.astype(np.float32))),
        ("png", lambda ramp: Image.fromarray(ramp)),
        ("png", lambda ramp: Image.fromarray(ramp).convert("P")),
    ],
    ids=["png16", "tif16", "png12", "tif10", "pgm16", "int32-8bit", "int32-16bit", "int32", "float1", "float255",
         "png8", "palette"],
)  # fmt: skip
def test_a7_grey_levels_of_any_depth_are_scaled_by_their_range(
    tmp_path: Path, ending: str, make: Callable[[np.ndarray], Image.Image]
) -> None:
    pixels = saved(tmp_path / f"a.{ending}", make(RAMP))
    assert np.abs(pixels.astype(int) - RAMP[..., None]).max() <= 1


def test_a7_one_bit_images_are_black_and_white(tmp_path: Path) -> None:
    assert set(np.unique(saved(tmp_path / "a.png", Image.fromarray(RAMP > 100)))) == {0, 255}


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        (np.array([[-1000, 3000]], dtype=np.int32), "grey levels from -1000 to 3000; expected none below 0"),
        (np.array([[-0.5, 0.5]], dtype=np.float32), r"float pixels from -0.5 to 0.5; expected 0 to 1"),
        (np.array([[0, 4095]], dtype=np.float32), r"float pixels from 0 to 4095; expected 0 to 1"),
        (np.array([[0, np.nan]], dtype=np.float32), "float pixels that are not numbers"),
    ],
)
def test_a7_values_that_are_no_shades_of_grey_are_refused_by_name(
    tmp_path: Path, pixels: np.ndarray, expected: str
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=expected):
        open_image_file(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "colour key", "palette", "grey16"])
def test_a7_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    # Hidden pixels are red or dark, the visible one is black.
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    path, options = tmp_path / "a.png", {}
    if mode == "colour key":
        image, options = image.convert("RGB"), {"transparency": (200, 0, 0)}
    elif mode == "palette":
        image = image.quantize(4)
    elif mode == "grey16":
        image = Image.fromarray(np.array([[40000, 0]], dtype=np.uint16))
        options = {"transparency": 40000}
    elif mode == "PA":
        path = tmp_path / "a.tif"
        image = image.convert("LA").convert("RGBA")
    else:
        image = image.convert(mode)
    pixels = saved(path, image, **options)
    assert pixels[0].tolist() == [[255, 255, 255], [0, 0, 0]]


@pytest.mark.parametrize(
    ("mode", "colour"), [("CMYK", (0, 255, 255, 0)), ("YCbCr", (76, 85, 255)), ("RGB", (255, 0, 0))]
)
def test_a7_other_colour_modes_show_the_same_red(tmp_path: Path, mode: str, colour: tuple[int, ...]) -> None:
    pixels = saved(tmp_path / "a.tif", Image.new(mode, (2, 2), colour))
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 3


def test_of_animations_and_pages_the_first_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for ending in ("gif", "tif", "webp", "png"):
        path = tmp_path / f"a.{ending}"
        pixels = saved(path, frames[0], save_all=True, append_images=frames[1:])
        assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 3, ending


def test_endings_are_those_of_formats_that_can_be_decoded() -> None:
    expected = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".avif", ".jp2", ".tif", ".bmp", ".mpo"}
    assert expected <= readable_endings()
    # PostScript would be run by another program, and of the others Pillow knows no more than the name.
    assert readable_endings().isdisjoint({".eps", ".ps", ".pdf", ".mpg", ".h5", ".grib", ".wmf", ".txt", ""})


def test_what_an_ending_says_wrongly_does_not_matter(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", format="PNG")
    assert open_image_file(tmp_path / "a.jpg").getpixel((0, 0)) == (255, 0, 0)
