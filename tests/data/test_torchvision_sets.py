"""torchvision's own sets: every one takes the arguments that it is given here, and small ones are read as they are."""

import inspect
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from snell_lightning.adapters.errors import UserError
from snell_lightning.data import ImageDataModule
from snell_lightning.data.splits import Splits
from snell_lightning.data.torchvision_sets import SETS, _labels, torchvision_set

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


def read(name: str, root: Path | None, download: bool = False) -> Splits:
    return torchvision_set(name, download, root, 0.2, 0.2, 0)


def paint(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def mnist(root: Path) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 20), ("t10k", 10)):
        pixels = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (raw / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())


@pytest.mark.parametrize("name", SETS)
def test_each_set_takes_what_it_is_given(name: str) -> None:
    set_class = getattr(torchvision.datasets, name)
    known = inspect.signature(set_class.__init__).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for arguments in SETS[name].values():
        assert anything or arguments.keys() <= known.keys()
    assert name == "ImageNet" or anything or "download" in known


def test_a_set_with_train_and_test(tmp_path: Path) -> None:
    mnist(tmp_path)

    splits = read("MNIST", tmp_path)

    assert (len(splits.train) + len(splits.val), len(splits.test)) == (20, 10)
    assert splits.by_fractions
    assert splits.classes[3] == "3 - three"
    source, label = splits.test[7]
    assert label == 7
    assert splits.open_image(source).getpixel((0, 0)) == (7, 7, 7)
    # It goes to worker processes.
    assert pickle.loads(pickle.dumps(splits.open_image))(source).mode == "RGB"


def test_a_set_without_splits(tmp_path: Path) -> None:
    for kind in ("Forest", "River"):
        for number in range(10):
            paint(tmp_path / "eurosat" / "2750" / kind / f"{number}.jpg")

    splits = read("EuroSAT", tmp_path)

    assert splits.classes == ("Forest", "River")
    assert sum(len(part) for part in (splits.train, splits.val, splits.test)) == 20
    assert len(splits.test) > 0


def test_a_set_with_three_splits(tmp_path: Path) -> None:
    base = tmp_path / "dtd" / "dtd"
    for place, split in enumerate(("train", "val", "test")):
        lines = [f"{kind}/{kind}_{split}{number}.jpg" for kind in ("banded", "woven") for number in range(place + 2)]
        for number, line in enumerate(lines):
            paint(base / "images" / line, number)
        (base / "labels").mkdir(exist_ok=True)
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines) + "\n")

    splits = read("DTD", tmp_path)

    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [4, 6, 8]
    assert splits.classes == ("banded", "woven")
    assert not splits.by_fractions


def test_a_set_of_pairs(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for number, wnid in enumerate(("n01440764", "n02102040", "n02979186", "n03000684", "n03028079")):
            paint(tmp_path / "imagenette2" / split / wnid / "a.JPEG", number)
        for number, wnid in enumerate(("n03394916", "n03417042", "n03425413", "n03445777", "n03888257")):
            paint(tmp_path / "imagenette2" / split / wnid / "a.JPEG", number)

    splits = read("Imagenette", tmp_path)

    assert [label for _, label in splits.val] == list(range(10))
    assert splits.test == []


def test_it_feeds_the_data_module(tmp_path: Path) -> None:
    mnist(tmp_path)

    data = ImageDataModule("torchvision:MNIST", str(tmp_path), image_size=8, batch_size=4, num_workers=2)

    images, labels, *_ = next(iter(data.test_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert labels.tolist() == [0, 1, 2, 3]


def test_each_mistake_is_one_line(tmp_path: Path) -> None:
    for call, message in (
        (lambda: read("MNST", tmp_path), r"is none of torchvision's sets; there are CIFAR10"),
        (lambda: read("MNIST", None), r"torchvision:MNIST needs data.root"),
        (lambda: read("Flowers102", tmp_path), r"Flowers102 is not in .*: set data.download true to fetch it \("),
        (lambda: ImageDataModule("imagenet"), r"expected one of digits, folder, .*torchvision:NAME"),
        (lambda: ImageDataModule("digits", download=True), r"data.download is for data.source torchvision:NAME"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1


def test_the_docs_list_all_of_them() -> None:
    section = DOCS.read_text(encoding="utf-8").partition("## torchvision's sets")[2].partition("\n## ")[0]
    listed = re.search(r"as below: (.*?)\. Those", section, flags=re.DOTALL)[1]
    assert sorted(re.split(r",\s+", listed)) == sorted(SETS)


def test_a_label_of_several_numbers_begins_with_the_class(tmp_path: Path) -> None:
    import torch

    class Numbers:
        targets = torch.tensor([[3, 1, 9], [5, 0, 9]])

        def __len__(self) -> int:
            return 2

    assert _labels("QMNIST", Numbers()) == [3, 5]
