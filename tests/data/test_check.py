"""check-data: every planted fault is found, and nothing else is."""

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from snell_lightning import cli
from snell_lightning.data import Splits
from snell_lightning.data.check import KINDS, Checked, check, print_report
from snell_lightning.data.datamodule import DataToCheck
from snell_lightning.data.folder import folder
from snell_lightning.data.images import open_image_file

CLASSES = ("ant", "bee", "cat", "dog")
PER_CLASS = {"train": 300, "val": 100, "test": 100}


def picture(number: int, size: int = 64) -> Image.Image:
    """An image like no other: soft patches of colour with some grain."""
    draw = np.random.default_rng(number)
    patches = Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    pixels = np.asarray(patches.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray((pixels + draw.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 images in ready splits."""
    root, number = tmp_path_factory.mktemp("images"), 0
    for split, count in PER_CLASS.items():
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for _ in range(count):
                picture(number).save(root / split / name / f"{number:04}.jpg", quality=90)
                number += 1
    return root


def look_at(root: Path) -> Checked:
    # In this process: the suite has a worker for each processor already.
    return check(folder(root, 0.15, 0.25, 0), 224, root, workers=0)


def found(checked: Checked) -> dict[str, list[tuple[str, ...]]]:
    kinds: dict[str, list[tuple[str, ...]]] = {}
    for finding in checked.findings:
        kinds.setdefault(finding.kind, []).append(tuple(finding.items))
    return kinds


def test_of_2000_good_images_nothing_is_said(clean: Path) -> None:
    checked = look_at(clean)
    assert checked.findings == ()
    assert checked.counts == {split: dict.fromkeys(CLASSES, count) for split, count in PER_CLASS.items()}
    assert checked.formats == {"JPEG": 2000}
    assert checked.sizes == {"width": (64, 64, 64), "height": (64, 64, 64)}


def saved(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)  # type: ignore[arg-type]
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 10**9 pixels."""
    header = saved(Image.new("1", (1, 1)), format="PNG")
    import zlib

    size = (40_000).to_bytes(4, "big") + (40_000).to_bytes(4, "big") + header[24:29]
    return header[:16] + size + zlib.crc32(b"IHDR" + size).to_bytes(4, "big") + header[33:]


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(picture(9004), format="JPEG", exif=exif)


def see_through() -> bytes:
    image = picture(9005).convert("RGBA")
    image.putpixel((0, 0), (255, 0, 0, 10))
    return saved(image, format="PNG")


def deep() -> bytes:
    grey = np.asarray(picture(9006).convert("L"), dtype=np.uint16)
    return saved(Image.fromarray(grey * 257), format="PNG")


def not_numbers() -> bytes:
    pixels = np.asarray(picture(9007).convert("L"), dtype=np.float32) / 255
    pixels[3, 3] = np.nan
    return saved(Image.fromarray(pixels), format="TIFF")


def brighter(image: Image.Image) -> Image.Image:
    return image.resize((96, 96), Image.Resampling.BICUBIC).point(lambda level: round(20 + 0.8 * level))


# Files that are planted: a kind, where, and what.
ALONE: list[tuple[str, str, Callable[[], bytes]]] = [
    ("empty", "train/ant/empty.jpg", lambda: b""),
    ("damaged", "train/ant/broken.jpg", lambda: saved(picture(9000), format="JPEG")[:-700]),
    ("damaged", "val/bee/broken.png", lambda: saved(picture(9001), format="PNG")[:3000]),
    ("foreign", "train/bee/page.jpg", lambda: b"<html>not found</html>"),
    ("too_large", "train/bee/bomb.png", bomb),
    ("bad_values", "train/cat/nan.tif", not_numbers),
    ("blank", "train/cat/white.jpg", lambda: saved(Image.new("RGB", (64, 64), "white"), format="JPEG")),
    ("tiny", "train/cat/thumb.png", lambda: saved(picture(9002, 20), format="PNG")),
    ("elongated", "train/cat/banner.png", lambda: saved(picture(9003, 400).crop((0, 0, 400, 64)), format="PNG")),
    ("turned", "train/dog/phone.jpg", turned),
    ("hidden_pixels", "train/dog/cut.png", see_through),
    ("deep", "train/dog/deep.png", deep),
    (
        "more_frames",
        "train/dog/two.gif",
        lambda: saved(picture(9008), format="GIF", save_all=True, append_images=[picture(9009)]),
    ),
    ("cmyk", "test/dog/print.jpg", lambda: saved(picture(9010).convert("CMYK"), format="JPEG")),
    ("wrong_ending", "test/dog/renamed.jpg", lambda: saved(picture(9011), format="PNG")),
    ("odd_mode", "test/ant/grey.jpg", lambda: saved(picture(9012).convert("L"), format="JPEG")),
    ("huge", "test/ant/huge.jpg", lambda: saved(picture(9013, 64).resize((5200, 5200)), format="JPEG", quality=30)),
]
# What is planted twice: a kind, the first, the second, and how it differs.
TWICE: list[tuple[str, str, str, Callable[[Image.Image], Image.Image] | None]] = [
    ("leak", "train/ant/0000.jpg", "test/ant/again.jpg", None),
    ("label_conflict", "train/ant/0001.jpg", "train/bee/again.jpg", None),
    ("duplicate", "val/bee/1330.jpg", "val/bee/again.jpg", None),
    ("near_leak", "train/cat/0650.jpg", "val/cat/again.jpg", brighter),
    ("near_conflict", "train/cat/0651.jpg", "train/dog/again.jpg", brighter),
    ("near_duplicate", "test/dog/1950.jpg", "test/dog/again.jpg", brighter),
]


@pytest.fixture(scope="module")
def faulty(clean: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("faulty") / "images"
    shutil.copytree(clean, root)
    for _, path, content in ALONE:
        (root / path).write_bytes(content())
    for _, first, second, change in TWICE:
        if change is None:
            shutil.copyfile(root / first, root / second)
        else:
            with Image.open(root / first) as image:
                change(image.convert("RGB")).save(root / second, quality=70)
    # A class with few images, none of them in test.
    for split, count in (("train", 4), ("val", 1)):
        (root / split / "emu").mkdir()
        for number in range(count):
            picture(8000 + number + 10 * count).save(root / split / "emu" / f"{number}.jpg")
    (root / "train" / "ant" / "notes.txt").write_text("ants")
    (root / "train" / "ant" / ".hidden.jpg").write_bytes(b"")
    yield root
    shutil.rmtree(root)


def test_every_planted_fault_is_found_and_nothing_else_is(faulty: Path) -> None:
    checked = look_at(faulty)
    expected: dict[str, set[tuple[str, ...]]] = {}
    for kind, path, _ in ALONE:
        expected.setdefault(kind, set()).add((path,))
    # What is planted grey is grey beside colours too.
    expected["odd_mode"] |= {("train/dog/deep.png",), ("train/cat/white.jpg",)}
    for kind, first, second, _ in TWICE:
        expected.setdefault(kind, set()).add(tuple(sorted((first, second))))
    expected |= {"few_images": {("emu",)}, "class_gap": {("emu",)}, "left_out": {()}, "imbalance": {("ant", "emu")}}
    told = {kind: {tuple(sorted(items)) for items in all_items} for kind, all_items in found(checked).items()}
    assert [finding.detail for finding in checked.findings if finding.kind == "left_out"] == [
        "left out by ending: 1 .txt"
    ]
    largest = max(checked.counts["train"], key=checked.counts["train"].__getitem__)
    expected["imbalance"] = {tuple(sorted((largest, "emu")))}
    assert told == expected
    assert len(expected) >= 20


def test_what_a_table_lists_and_is_not_there_is_named_with_classes_that_are_not_trained(tmp_path: Path) -> None:
    rows = ["path,label,split"]
    for number, (label, split) in enumerate([(label, "train") for label in "ab" for _ in range(5)] + [("c", "test")]):
        picture(number).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{label},{split}")
    rows += [f"gone/{number}.png,a,train" for number in range(2)]
    (tmp_path / "photos.csv").write_text("\n".join(rows))
    data = DataToCheck("table", str(tmp_path / "photos.csv"))
    kinds = found(check(data.splits, data.image_size, tmp_path, workers=0))
    assert kinds["missing"] == [("gone/0.png",), ("gone/1.png",)]
    assert kinds["untrained_class"] == [("c",)]
    assert kinds["class_gap"] == [("c",), ("a",), ("b",)]


def test_images_that_are_no_files_are_looked_at_too() -> None:
    data = DataToCheck("digits")
    checked = check(data.splits, 32, workers=0)
    assert (checked.looked_at, checked.findings) == (1797, ())


def test_several_processes_see_what_one_sees(faulty: Path) -> None:
    splits = folder(faulty, 0.15, 0.25, 0)
    few = Splits(splits.train[:80], splits.val[:40], [], splits.classes)
    one, two = (check(few, 224, faulty, workers=workers) for workers in (0, 2))
    assert one.findings == two.findings
    assert len(one.findings) > 5


class TestTheCommand:
    def run(self, root: Path, *options: str) -> int:
        arguments = ["check-data", "--config", "vit.yaml", "--data.source", "folder", "--data.root", str(root)]
        try:
            cli.main([*arguments, "--workers", "0", *options])
        except SystemExit as stop:
            return int(str(stop.code or 0))
        return 0

    def small(self, root: Path) -> Path:
        for number in range(40):
            path = root / CLASSES[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number).save(path)
        return root

    def test_good_images_are_status_0_and_leave_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        root = self.small(tmp_path / "photos")
        assert self.run(root) == 0
        assert "0 errors, 0 warnings, 0 notes in 40 images" in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir()] == ["photos"]

    def test_an_error_is_status_1_and_in_the_report(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        root = self.small(tmp_path / "photos")
        (root / "ant" / "page [1].jpg").write_text("<html>")
        assert self.run(root, "--output", str(tmp_path / "report" / "photos.json")) == 1
        assert "error: 1 x no images, whatever their names end in; remove them" in capsys.readouterr().out
        report = json.loads((tmp_path / "report" / "photos.json").read_text())
        (finding,) = report["findings"]
        assert finding["items"] == ["ant/page [1].jpg"]
        assert (finding["level"], finding["kind"]) == ("error", "foreign")
        assert report["counts"]["train"]["ant"] + report["counts"]["val"]["ant"] + report["counts"]["test"]["ant"] == 21

    def test_a_warning_is_status_0(self, tmp_path: Path) -> None:
        root = self.small(tmp_path / "photos")
        Image.new("RGB", (64, 64)).save(root / "bee" / "black.png")
        assert self.run(root) == 0

    def test_a_root_that_is_none_is_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(tmp_path / "nothing") == 1
        assert re.search("^error: .*nothing.*", capsys.readouterr().err.splitlines()[-1])


def test_every_kind_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in KINDS if f"`{name}`" not in text] == []


def test_of_many_classes_those_with_the_fewest_and_the_most_images_are_printed(tmp_path: Path) -> None:
    names = tuple(f"class {number:02}" for number in range(30))
    samples = [(str(tmp_path / "none.png"), label) for label in range(30) for _ in range(label + 1)]
    console = Console(record=True, width=100, file=io.StringIO())
    print_report(check(Splits(samples, [], [], names, open_image_file), 224, workers=0), console)
    printed = console.export_text()
    assert "class 00" in printed
    assert "class 29" in printed
    assert "class 15" not in printed
    assert "... 10 more" in printed
    assert "error: 465 x listed, and not there" in printed
    assert "... and 462 more" in printed
