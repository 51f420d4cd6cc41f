"""Train on folders of photographs of many sizes, formats and colour modes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from snell_lightning.adapters import read_adapter

from .conftest import QUICK, Command

CLASSES = ("circle", "gradient", "noise")
FROM_FOLDER = ("--config", "data/folder.yaml", "--data.num_workers", "0")


def photo(kind: str, random: np.random.Generator) -> Image.Image:
    """A picture of random size: a circle on a plain ground, a gradient between two colours, or noise."""
    width, height = (int(side) for side in random.integers(24, 120, 2))
    first, second = (random.integers(0, 256, 3) for _ in range(2))
    if kind == "circle":
        image = Image.new("RGB", (width, height), tuple(map(int, first)))
        radius = min(width, height) // 3
        centre = width // 2, height // 2
        ImageDraw.Draw(image).circle(centre, radius, fill=tuple(map(int, second)))
        return image
    if kind == "gradient":
        share = np.linspace(0, 1, width)[None, :, None]
        pixels = np.broadcast_to(first * (1 - share) + second * share, (height, width, 3))
        return Image.fromarray(pixels.astype(np.uint8))
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_photos(root: Path, per_class: int, seed: int = 0) -> None:
    """Fill one folder per class, every other image as PNG; three images have another colour mode than RGB."""
    random = np.random.default_rng(seed)
    modes = {("circle", 0): "L", ("gradient", 1): "RGBA", ("noise", 1): "P"}
    for kind in CLASSES:
        (root / kind).mkdir(parents=True)
        for number in range(per_class):
            image = photo(kind, random).convert(modes.get((kind, number), "RGB"))
            image.save(root / kind / f"{number:02}.{'png' if number % 2 else 'jpg'}")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_class_folders_are_split_trained_on_and_their_names_saved(here: Path, command: Command) -> None:
    write_photos(here / "photos", 20)
    modes = {Image.open(path).mode for path in (here / "photos").rglob("*.*")}
    assert modes == {"RGB", "L", "RGBA", "P"}
    options = ("--data.root", "photos", "--trainer.limit_train_batches", "1.0", "--trainer.max_epochs", "1")
    done = command("fit", *QUICK, *FROM_FOLDER, *options)
    assert (done.status, done.errors) == (0, [])
    _, metadata = read_adapter("runs/version_0/adapter.safetensors")
    assert metadata["classes"] == list(CLASSES)
    assert metadata["num_classes"] == 3

    adapter = ("--model.adapter.rank", "2", "--model.adapter_file", "runs/version_0/adapter.safetensors")
    done = command("predict", "--config", "vit.yaml", *FROM_FOLDER, "--data.root", "photos", *adapter)
    assert (done.status, done.errors) == (0, [])
    lines = (here / "runs" / "predict_0" / "predictions.csv").read_text().splitlines()[1:]
    # A quarter of 60 images, which are drawn one by one.
    assert 5 <= len(lines) <= 25
    for line in lines:
        path, name, _, error = line.split(",")
        assert error == ""
        assert Path(path).is_file()
        assert name in CLASSES


def test_ready_splits_are_used_as_they_are(here: Path, command: Command, caplog: pytest.LogCaptureFixture) -> None:
    for seed, (split, count) in enumerate({"train": 6, "val": 2, "test": 3}.items()):
        write_photos(here / "photos" / split, count, seed)
    done = command("fit", *QUICK, *FROM_FOLDER, "--data.root", "photos")
    assert (done.status, done.errors) == (0, [])
    assert "data: folder, 18 train / 6 val / 9 test images, 3 classes" in caplog.text

    done = command(
        *("test", "--config", "vit.yaml", *FROM_FOLDER, "--data.root", "photos"),
        *("--ckpt_path", "runs/version_0/checkpoints/last.ckpt"),
    )
    assert (done.status, done.errors) == (0, [])
    (line,) = (line for line in done.out.splitlines() if "test/acc1" in line)
    correct = float(line.replace("│", " ").split()[-1]) * 9
    assert correct == pytest.approx(round(correct), abs=1e-4)
