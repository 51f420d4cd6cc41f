"""Sets of the Hugging Face hub and folders of their library, made here: nothing is fetched."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from snell_lightning import UserError
from snell_lightning.data import ImageDataModule
from snell_lightning.data.check import check
from snell_lightning.data.hugging_face import hugging_face

datasets.disable_progress_bars()
NAMES = ("ant", "bee", "cat")


def colour(number: int) -> tuple[int, int, int]:
    return (number * 7 % 256, 40, 255 - number * 5 % 256)


def rows(count: int, start: int = 0, **more: Any) -> datasets.Dataset:
    columns = {
        "image": [Image.new("RGB", (8, 6), colour(start + number)) for number in range(count)],
        "label": [number % 3 for number in range(count)],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    parts = {"train": rows(30), "validation": rows(6, 100), "test": rows(9, 200), "unsupervised": rows(3, 300)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def read(root: Path | None, name: str = "", **settings: Any) -> Any:
    return hugging_face(name, root, 0.2, 0.2, 0, **settings)


def test_a_folder_that_was_saved_is_read_in_its_own_splits(saved: Path) -> None:
    splits = read(saved)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (30, 6, 9)
    assert splits.classes == NAMES
    assert splits.notes == (f"not used of {saved}: unsupervised",)
    source, label = splits.test[4]
    assert label == 1
    assert splits.open_image(source).getpixel((0, 0)) == colour(204)


def test_it_feeds_the_data_module_with_workers_and_can_be_checked(saved: Path) -> None:
    data = ImageDataModule("datasets", str(saved), image_size=8, augmentation="none", batch_size=4, num_workers=2)
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert labels.tolist() == [0, 1, 2, 0]
    expected = (torch.tensor(colour(100)) / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    assert torch.allclose(images[0, :, 3, 3], expected, atol=1e-6)
    checked = check(data.splits, 8, workers=0)
    assert (checked.looked_at, checked.errors) == (45, ())


def test_a_folder_of_parquet_files_with_train_alone_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "parquet").mkdir()
    rows(60).to_parquet(str(tmp_path / "parquet" / "train-00000-of-00001.parquet"))
    splits = read(tmp_path / "parquet")
    assert splits.by_fractions
    assert len(splits.train) + len(splits.val) + len(splits.test) == 60
    assert min(len(splits.val), len(splits.test)) > 0
    assert read(tmp_path / "parquet").val == splits.val


def test_the_hub_is_asked_by_name_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*names: Any) -> Any:
        asked.append(names)
        return datasets.DatasetDict(train=rows(30), test=rows(6, 100))

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = ImageDataModule("datasets:people/insects:small", image_size=8)
    assert asked == [("people/insects", "small")]
    assert data.class_names == NAMES
    assert len(data.splits.test) == 6
    read(None, "people/insects")
    assert asked[-1] == ("people/insects", None)


def test_pixels_are_read_as_from_a_file(tmp_path: Path) -> None:
    """EXIF, transparency and deep grey go through the reader of files."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, seen, deep = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 4)).save(turned, "JPEG", exif=exif)
    Image.new("RGBA", (8, 4), (255, 0, 0, 0)).save(seen, "PNG")
    Image.fromarray(np.full((4, 8), 65535, np.uint16)).save(deep, "PNG")
    encoded = [{"bytes": each.getvalue(), "path": None} for each in (turned, seen, deep)] * 4
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    table = {"image": encoded, "label": ["a", "b", "b"] * 4}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(tmp_path / "mixed"))
    splits = read(tmp_path / "mixed")
    opened = {
        source[1]: splits.open_image(source) for part in (splits.train, splits.val, splits.test) for source, _ in part
    }
    assert splits.classes == ("a", "b")
    assert opened[0].size == (4, 8)
    assert opened[1].getpixel((0, 0)) == opened[2].getpixel((0, 0)) == (255, 255, 255)


def renamed(part: datasets.Dataset) -> datasets.Dataset:
    return part.rename_columns({"image": "img", "label": "kind"}).add_column("label", [0] * len(part))


def test_columns_are_told_by_their_types_or_by_name(tmp_path: Path) -> None:
    rows(30).rename_columns({"image": "img", "label": "kind"}).save_to_disk(str(tmp_path / "typed"))
    assert read(tmp_path / "typed").classes == NAMES
    renamed(rows(30)).save_to_disk(str(tmp_path / "named"))
    assert read(tmp_path / "named", columns={"label": "kind"}).classes == NAMES


def test_hidden_labels_are_not_used(tmp_path: Path) -> None:
    hidden = rows(6).map(lambda row: {"label": -1})
    datasets.DatasetDict(train=rows(30), test=hidden).save_to_disk(str(tmp_path / "hidden"))
    splits = read(tmp_path / "hidden")
    assert splits.notes == ("the images of test have no labels and are not used",)
    assert len(splits.test) + len(splits.val) + len(splits.train) == 30


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda _: None, {}, "needs a name, datasets:ORG/NAME, or a folder as data.root"),
        (lambda root: root / "none", {}, "there is no folder .*none; expected one that the library"),
        (lambda root: root, {"columns": {"path": "image"}}, "has 'path'; of a Hugging Face set it names the columns"),
        (lambda root: root, {"columns": {"image": "img"}}, "has no column 'img' but 'image', 'label'"),
        (
            lambda root: root,
            {"columns": {"image": "label"}},
            r"columns 'image' \(Image\), 'label' \(ClassLabel\); name",
        ),
        (lambda root: root, {"name": "a/b"}, "and not both"),
    ],
)
def test_each_mistake_is_one_line(
    saved: Path, change: Callable[[Path], Path | None], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(change(saved), **settings)
    assert len(str(caught.value).splitlines()) == 1


def test_what_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Any:
        raise ConnectionError("Couldn't reach 'no/such' on the Hub (offline)\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"^the set no/such cannot be had: Couldn't reach 'no/such' on the Hub"):
        read(None, "no/such")
    with pytest.raises(UserError, match=r"data.source is 'torchvisions'; expected one of .*datasets:NAME"):
        ImageDataModule("torchvisions")
