"""Every line of the tables in docs/data.md, run."""

import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pillow_heif import register_heif_opener

from snell_lightning.adapters.errors import UserError
from snell_lightning.data import ImageDataModule
from snell_lightning.data.folder import SPELLINGS, folder, split_named
from snell_lightning.data.images import open_image_file, readable_endings
from snell_lightning.data.splits import Splits

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
Check = Callable[[Path], None]


def first_cells() -> list[str]:
    """The first cell of each row of each table."""
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    heads = {lines[number - 1] for number, line in enumerate(lines) if line.startswith("|--")}
    return [row for row in rows if row not in {head.split(" | ")[0].removeprefix("| ") for head in heads}]


def make(root: Path, **counts: int) -> None:
    """Images in folders, given as `train__ant=3`."""
    for name, count in counts.items():
        for number in range(count):
            path = root / name.replace("__", "/") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (number, len(name), 0)).save(path)


def read(root: Path) -> Splits:
    return folder(root, 0.2, 0.2, 0)


def sizes(splits: Splits) -> tuple[int, int, int]:
    return len(splits.train), len(splits.val), len(splits.test)


def refused(root: Path, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        read(root)


CHECKS: dict[str, Check] = {}


def row(cell: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        assert cell not in CHECKS
        CHECKS[cell] = check
        return check

    return register


def test_every_row_of_the_page_has_its_check() -> None:
    assert sorted(first_cells()) == sorted(CHECKS)


@pytest.mark.parametrize("cell", first_cells())
def test_row(cell: str, tmp_path: Path) -> None:
    CHECKS[cell](tmp_path)


@row("`CLASS/IMAGE`")
def _(root: Path) -> None:
    make(root, ant=9, bee=9)
    splits = read(root)
    assert (splits.classes, sum(sizes(splits)), min(sizes(splits)) > 0) == (("ant", "bee"), 18, True)


@row("`CLASS/any/depth/IMAGE`")
def _(root: Path) -> None:
    make(root, site1__ant__old=9, site1__bee=9, site2__ant=9)
    splits = read(root)
    assert (splits.classes, sum(sizes(splits))) == (("site1", "site2"), 27)
    assert splits.notes == ("classes are site1, site2; the folders ant in each are taken as one",)


@row("`train/CLASS/IMAGE`, `val/CLASS/IMAGE`, `test/CLASS/IMAGE`")
def _(root: Path) -> None:
    make(root, train__ant=3, train__bee=3, val__ant=2, val__bee=1, test__ant=1, test__bee=1)
    assert (sizes(read(root)), read(root).notes) == ((6, 3, 2), ())


@row("`train/CLASS/IMAGE` alone")
def _(root: Path) -> None:
    make(root, train__ant=9, train__bee=9)
    train, val, test = sizes(read(root))
    assert (train + val, test, val > 1) == (18, 0, True)


@row("`train/CLASS/IMAGE`, `test/IMAGE`")
def _(root: Path) -> None:
    make(root, train__ant=9, train__bee=9, test=4)
    assert (sizes(read(root))[2], read(root).notes) == (0, ("not used beside train/: test/ (no class folders)",))


@row("`train/CLASS/IMAGE`, `val/IMAGE`")
def _(root: Path) -> None:
    make(root, train__ant=9, train__bee=9, val=4)
    refused(root, "val has no class folders")


@row("`train/IMAGE`, `test/IMAGE`")
def _(root: Path) -> None:
    make(root, train=9, test=4)
    refused(root, "images and no class folders; a split holds one folder per class")


@row("`valid/IMAGE`, `invalid/IMAGE`")
def _(root: Path) -> None:
    make(root, valid=9, invalid=9)
    assert read(root).classes == ("invalid", "valid")
    assert read(root).notes == ("valid is taken for a class, as it holds images and no class folders",)


@row("`photos/CLASS/IMAGE` alone")
def _(root: Path) -> None:
    make(root, photos__ant=3, photos__bee=3)
    refused(root, r"did you mean .*photos\?")


@row("`val/CLASS/IMAGE`, `test/CLASS/IMAGE` without train")
def _(root: Path) -> None:
    make(root, val__ant=3, test__ant=2)
    refused(root, "data.eval_split to all")
    splits = folder(root, 0.2, 0.2, 0, classes=["ant", "bee"])
    assert (sizes(splits), splits.classes) == ((0, 3, 2), ("ant",))


@row("`CLASS/train/IMAGE`, `CLASS/test/IMAGE`")
def _(root: Path) -> None:
    make(root, ant__train=3, ant__test=3, bee__train=3, bee__test=3)
    refused(root, "class folders ant, bee holds the split folders test, train; .*move the split folders to the top")


@row("`train/`, `Training/` both")
def _(root: Path) -> None:
    make(root, train__ant=3, train__bee=3, Training__ant=3)
    refused(root, "mean the same; keep one")


@row("anything else beside `train/`")
def _(root: Path) -> None:
    make(root, train__ant=9, train__bee=9, drafts=2)
    assert read(root).notes == ("not used beside train/: drafts/",)


@row("a class in val or test that neither train nor the adapter has")
def _(root: Path) -> None:
    make(root, train__ant=3, train__bee=3, val__cat=3)
    refused(root, "val/cat is a class that train does not have")
    assert folder(root, 0.2, 0.2, 0, classes=["ant", "bee", "cat"]).val[0][1] == 2


@row("a class folder without an image that can be read")
def _(root: Path) -> None:
    make(root, ant=3)
    (root / "bee").mkdir()
    (root / "bee/0.xyz").touch()
    refused(root, r"bee has no images that can be read \(1 .xyz are left out\)")


def check_spellings(split: str) -> Check:
    def check(_: Path) -> None:
        (line,) = (line for line in DOCS.read_text().splitlines() if line.startswith(f"| {split} |"))
        words = tuple(line.strip("| ").split(" | ")[1].split(", "))
        assert SPELLINGS[split] == words  # type: ignore[index]
        for word in words:
            for name in (
                word,
                word.upper(),
                word.title(),
                f"{word}_set",
                f"{word}Images",
                f"{word} data",
                f"{word}-split",
            ):
                assert split_named(name) == split, name
            assert split_named(f"x{word}") is None

    return check


for _split in ("train", "val", "test"):
    CHECKS[_split] = check_spellings(_split)


@row("3 or more")
def _(root: Path) -> None:
    for name in "abcdefgh":
        make(root, **{name: 3})
    splits = read(root)
    assert all({label for _, label in part} == set(range(8)) for part in (splits.train, splits.val, splits.test))
    assert splits.fixed


@row("2")
def _(root: Path) -> None:
    make(root, ant=40, two=2)
    splits = read(root)
    assert [sum(label for _, label in part) for part in (splits.train, splits.val, splits.test)] == [1, 1, 0]
    assert splits.notes == ("no test image of two",)


@row("1")
def _(root: Path) -> None:
    make(root, ant=40, one=1)
    splits = read(root)
    assert [sum(label for _, label in part) for part in (splits.train, splits.val, splits.test)] == [1, 0, 0]
    assert splits.notes == ("no val image of one", "no test image of one")


@row(next(cell for cell in first_cells() if "whatever else the installed Pillow decodes" in cell))
def _(root: Path) -> None:
    cell = next(cell for cell in first_cells() if "whatever else the installed Pillow decodes" in cell)
    for ending in re.findall(r"\.\w+", cell):
        assert ending in readable_endings()
        Image.new("RGB", (8, 8), "red").save(root / f"a{ending}")
        assert open_image_file(root / f"a{ending}").getpixel((4, 4))[0] > 200  # type: ignore[index]


@row("`.heic .heif`")
def _(root: Path) -> None:
    register_heif_opener()
    for ending in (".heic", ".heif"):
        Image.new("RGB", (64, 64), "red").save(root / f"a{ending}", format="HEIF")
        assert open_image_file(root / f"a{ending}").getpixel((4, 4))[0] > 200  # type: ignore[index]
        assert ending in readable_endings()


@row("other endings, or none")
def _(root: Path) -> None:
    make(root, ant=9, bee=9)
    for name in ("a.txt", "b.TXT", "c"):
        (root / "ant" / name).touch()
    assert (sum(sizes(read(root))), read(root).notes) == (18, ("left out by ending: 2 .txt, 1 without ending",))


@row("EPS, PDF, whatever their ending")
def _(root: Path) -> None:
    for form in ("EPS", "PDF"):
        Image.new("RGB", (8, 8)).save(root / "a.png", format=form)
        with pytest.raises(OSError, match="cannot identify"):
            open_image_file(root / "a.png")


@row(next(cell for cell in first_cells() if cell.startswith("hidden files and folders")))
def _(root: Path) -> None:
    make(root, ant=9, bee=9)
    (root / "ant/.hidden.png").write_bytes((root / "ant/0.png").read_bytes())
    cell = next(cell for cell in first_cells() if cell.startswith("hidden files and folders"))
    for name in [".cache", *re.findall("`(.*?)`", cell)]:
        make(root / "ant" / name, inside=1)
        make(root / name, inside=1)
    assert (read(root).classes, sum(sizes(read(root)))) == (("ant", "bee"), 18)


@row("a link to an image that is listed already")
def _(root: Path) -> None:
    make(root, ant=9, bee=9)
    os.symlink("0.png", root / "ant/copy.png")
    os.symlink("../bee/0.png", root / "ant/other.png")
    splits = read(root)
    assert splits.notes == ("left out 2 links to images and folders that are listed already",)
    assert [sum(label == 1 for part in (splits.train, splits.val, splits.test) for _, label in part)] == [9]


@row("a link to a folder above, or to a class folder")
def _(root: Path) -> None:
    make(root, ant=9, bee=9)
    os.symlink("..", root / "ant/up")
    os.symlink("../bee", root / "ant/beside")
    assert (sum(sizes(read(root))), len(read(root).notes)) == (18, 1)


@row("a link to a folder elsewhere; a class folder that is a link")
def _(root: Path) -> None:
    make(root, pool__one=3, pool__two=9, here__ant=9)
    os.symlink("../../pool/one", root / "here/ant/more")
    os.symlink("../pool/two", root / "here/bee")
    assert sum(sizes(read(root / "here"))) == 21


@row("animations, several pages")
def _(root: Path) -> None:
    for ending in ("gif", "tif", "webp"):
        frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        frames[0].save(root / f"a.{ending}", save_all=True, append_images=frames[1:])
        assert open_image_file(root / f"a.{ending}").getpixel((4, 4))[0] > 200  # type: ignore[index]


def module(root: Path, **options: str) -> ImageDataModule:
    return ImageDataModule("folder", str(root), augmentation="none", eval_split="all", **options)  # type: ignore[arg-type]


@row("damaged, empty, foreign content")
def _(root: Path) -> None:
    make(root, ant=9, bee=9)
    whole = (root / "ant/0.png").read_bytes()
    for number, content in enumerate((whole[: len(whole) // 2], b"", b"text")):
        (root / f"ant/{number}.png").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read image .*ant/.*png: "):
        list(module(root).test_dataloader())
    assert sum(len(images) for images, _ in module(root, on_bad_image="skip").test_dataloader()) == 15
    loader = module(root, on_bad_image="skip").predict_dataloader()
    assert sum(len(images) for images, _ in loader) == 18
    assert len(loader.dataset.unreadable) == 3


@row("every image of a split unreadable")
def _(root: Path) -> None:
    # That it is an error is tested where there is a model: tests/test_module.py and tests/integration, A11.
    make(root, ant=9, bee=9)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    assert sum(len(images) for images, _ in module(root, on_bad_image="skip").test_dataloader()) == 0


# A grey ramp of 16 levels, as 8 bits.
RAMP = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4)


def seen(root: Path, image: Image.Image, ending: str = "png", **options: object) -> np.ndarray:
    image.save(root / f"a.{ending}", **options)
    return np.asarray(open_image_file(root / f"a.{ending}")).astype(int)


def shows_the_ramp(root: Path, pixels: np.ndarray, ending: str = "tif") -> None:
    assert np.abs(seen(root, Image.fromarray(pixels), ending) - RAMP[..., None]).max() <= 1


@row("EXIF orientation 2 to 8")
def _(root: Path) -> None:
    stored = Image.new("RGB", (16, 8))
    stored.paste((255, 255, 255), (0, 0, 4, 4))
    # Where the stored image's upper left corner is to be seen, by row and column from that side: EXIF 2.32, 4.6.5.
    for orientation, corner in {
        2: (0, -1),
        3: (-1, -1),
        4: (-1, 0),
        5: (0, 0),
        6: (0, -1),
        7: (-1, -1),
        8: (-1, 0),
    }.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = seen(root, stored, exif=exif)
        assert pixels.shape[:2] == ((8, 16) if orientation < 5 else (16, 8))
        assert pixels[corner].min() == 255


@row("EXIF that is damaged")
def _(root: Path) -> None:
    assert seen(root, Image.new("RGB", (8, 4)), "jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff").shape == (4, 8, 3)


@row("transparency: RGBA, LA, a transparent colour or palette entry")
def _(root: Path) -> None:
    image = Image.new("RGBA", (2, 2), (90, 0, 0, 0))
    for mode in ("RGBA", "LA", "P"):
        assert seen(root, image.quantize(2) if mode == "P" else image.convert(mode)).min() == 255
    assert seen(root, image.convert("RGB"), transparency=(90, 0, 0)).min() == 255


@row("1 bit, 8-bit grey, palette, CMYK, YCbCr")
def _(root: Path) -> None:
    for mode in ("1", "L", "P", "CMYK", "YCbCr"):
        assert seen(root, Image.new("RGB", (8, 8), "white").convert(mode), "tif").min() >= 254


@row("16-bit grey")
def _(root: Path) -> None:
    for ending in ("png", "tif"):
        shows_the_ramp(root, RAMP.astype(np.uint16) * 257, ending)


@row("10-, 12- or 14-bit grey in 16 bits")
def _(root: Path) -> None:
    for bits in (8, 10, 12, 14):
        shows_the_ramp(root, np.round(RAMP * ((2**bits - 1) / 255)).astype(np.uint16), "png")


@row("int32 grey from 0")
def _(root: Path) -> None:
    for bits in (8, 12, 16, 24, 31):
        shows_the_ramp(root, np.round(RAMP * ((2**bits - 1) / 255)).astype(np.int32))


@row("float grey in 0..1 or 0..255")
def _(root: Path) -> None:
    shows_the_ramp(root, (RAMP / 255).astype(np.float32))
    shows_the_ramp(root, RAMP.astype(np.float32))


@row("negative or larger floats, NaN, negative integers")
def _(root: Path) -> None:
    for value in (-1.0, 300.0, np.nan):
        with pytest.raises(ValueError, match="float pixels"):
            seen(root, Image.fromarray(np.array([[0.0, value]], dtype=np.float32)), "tif")
    with pytest.raises(ValueError, match="grey levels from -1 to 5"):
        seen(root, Image.fromarray(np.array([[-1, 5]], dtype=np.int32)), "tif")


@row("16-bit colour")
def _(root: Path) -> None:
    # Pillow writes no such file: a PNG by hand, one pixel of 16-bit red 0x80ff, green 0x01ff, blue 0.
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + struct.pack(">HHH", 0x80FF, 0x01FF, 0))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")
    (root / "a.png").write_bytes(content)
    assert open_image_file(root / "a.png").getpixel((0, 0)) == (0x80, 0x01, 0)
