"""VTAB-1k and FGVC from their lists: ready splits, the known numbers of classes, and a line for every mistake."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from snell_lightning.adapters.errors import UserError
from snell_lightning.data import ImageDataModule
from snell_lightning.data.lists import FGVC, VTAB, few_shot, fgvc, vtab

Change = Callable[[Path], object]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task with few images, in the layout of the benchmark."""
    root = tmp_path / "vtab-1k" / "kitti"
    lists: dict[str, list[str]] = {"train800": [], "val200": [], "test": []}
    for name, count in {"train800": 8, "val200": 4, "test": 6}.items():
        (root / "images" / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(root / "images" / name / f"{number:06}.jpg")
            lists[name].append(f"images/{name}/{number:06}.jpg {number % 4}")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, lines in lists.items():
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def read(root: Path | None) -> None:
    vtab(root, 0.15, 0.25, 0).require_files()


def test_its_lists_are_its_splits(task: Path) -> None:
    splits = vtab(task, 0.15, 0.25, 0)

    assert (len(splits.train), len(splits.val), len(splits.test)) == (8, 4, 6)
    assert splits.classes == ("0", "1", "2", "3")
    assert splits.train[5] == (str(task / "images/train800/000005.jpg"), 1)
    assert splits.notes == ()
    assert not splits.by_fractions


def test_it_feeds_the_data_module(task: Path) -> None:
    data = ImageDataModule("vtab", str(task), image_size=8, batch_size=4, augmentation="none")

    images, labels, *_ = next(iter(data.val_dataloader()))

    assert images.shape == (4, 3, 8, 8)
    assert labels.tolist() == [0, 1, 2, 3]


def test_another_folder_is_taken_by_its_lists_and_a_line_says_so(task: Path) -> None:
    splits = vtab(task.rename(task.parent / "mine"), 0.15, 0.25, 0)

    assert len(splits.classes) == 4
    assert splits.notes == ("mine is none of VTAB's tasks: 4 classes are taken from its lists",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "val200.txt").unlink(), r"has no val200.txt; expected ROOT/train800.txt.*VTAB-1k"),
        (lambda root: (root / "images/test/000003.jpg").unlink(), r"1 of the 6 test images listed in .* are not there"),
        (lambda root: (root / "test.txt").write_text("images/test/000003.jpg\n"), "line 1: .*expected an image's path"),
        (lambda root: (root / "test.txt").write_text("images/test/000003.jpg two\n"), "line 1: .*number of its class"),
        (lambda root: (root / "test.txt").write_text("\n\n"), "lists no image"),
        (lambda root: (root / "test.txt").write_text("images/test/000003.jpg 4\n"), "has class 4, and kitti has the 4"),
    ],
)
def test_each_mistake_is_one_line(task: Path, change: Change, message: str) -> None:
    change(task)
    with pytest.raises(UserError, match=message) as caught:
        read(task)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_root_shows_the_layout() -> None:
    for root in (None, Path("nothing")):
        with pytest.raises(UserError, match=r"expected ROOT/train800.txt, .* cifar, caltech101, .*VTAB-1k"):
            read(root)


def bird_set(folder: Path, images: str, classes: int = 200) -> Path:
    """A set whose lists number its classes from 1, with gaps."""
    for place, name in enumerate(("train", "val", "test")):
        listed = {}
        for number in range(classes):
            path = folder / images / f"{number:03}.Bird" / f"{name}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (number % 256, place, 0)).save(path)
            listed[f"{number:03}.Bird/{name}.jpg"] = 3 * number + 1
        (folder / f"{name}.json").write_text(json.dumps(listed))
    return folder


@pytest.mark.parametrize("images", ["images", "Images", "."])
def test_fgvc_wherever_its_images_are(tmp_path: Path, images: str) -> None:
    splits = fgvc(bird_set(tmp_path / "CUB_200_2011", images), 0.15, 0.25, 0)

    assert (len(splits.train), len(splits.val), len(splits.test)) == (200, 200, 200)
    assert splits.classes[:3] == ("1", "4", "7")
    path, label = splits.val[5]
    assert label == 5
    assert splits.open_image(path).size == (4, 4)
    assert splits.notes == ()


def test_fgvc_with_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    root = bird_set(tmp_path / "CUB_200_2011", "images", 20)
    with pytest.raises(UserError, match="have 20 classes, and this set has 200"):
        fgvc(root, 0.15, 0.25, 0)
    mine = root.rename(tmp_path / "mine")
    assert fgvc(mine, 0.15, 0.25, 0).notes == ("mine is none of FGVC's sets: 20 classes are taken from its lists",)
    (mine / "images/003.Bird/test.jpg").unlink()
    with pytest.raises(
        UserError, match=r"1 of the 20 test images listed in .* are not there, such as .*003.Bird/test.jpg"
    ):
        fgvc(mine, 0.15, 0.25, 0).require_files()
    (mine / "val.json").write_text('["a.jpg"]')
    with pytest.raises(UserError, match=r"val.json is not of the form \{IMAGE: CLASS"):
        fgvc(mine, 0.15, 0.25, 0)
    (mine / "val.json").unlink()
    with pytest.raises(UserError, match=r"has no val.json; expected ROOT/train.json.*github.com/KMnP/vpt"):
        fgvc(mine, 0.15, 0.25, 0)
    with pytest.raises(UserError, match=r"data.source fgvc needs data.root; expected"):
        fgvc(None, 0.15, 0.25, 0)


def test_there_are_19_tasks_and_five_sets() -> None:
    assert (len(VTAB), len(FGVC)) == (19, 5)


@pytest.mark.parametrize("images", ["images", "."])
def test_few_shot_lists(tmp_path: Path, images: str) -> None:
    root = tmp_path / "food101"
    (root / "annotations").mkdir(parents=True)
    lists = {"train_meta.list.num_shot_2.seed_1": 4, "val_meta.list": 2, "test_meta.list": 6}
    for name, count in lists.items():
        lines = []
        for number in range(count):
            path = root / images / "an apple pie" / f"{name}{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(path)
            lines.append(f"an apple pie/{path.name} {number % 2}")
        (root / "annotations" / name).write_text("\n".join(lines))
    file = root / "annotations" / "train_meta.list.num_shot_2.seed_1"

    splits = few_shot(file, 0.15, 0.25, 0)

    assert (len(splits.train), len(splits.val), len(splits.test)) == (4, 2, 6)
    assert (splits.classes, [label for _, label in splits.train]) == (("0", "1"), [0, 1, 0, 1])
    assert splits.open_image(splits.test[3][0]).size == (4, 4)
    with pytest.raises(UserError, match=r"needs as data.root the list .*; there are .*num_shot_2.seed_1"):
        few_shot(root, 0.15, 0.25, 0)
    with pytest.raises(UserError, match=r"needs as data.root the list SET/annotations"):
        few_shot(None, 0.15, 0.25, 0)
    (root / "annotations" / "test_meta.list").write_text("an apple pie/val_meta.list0.jpg 2")
    with pytest.raises(UserError, match=r"test_meta.list has class 2, and .* trains 0 to 1"):
        few_shot(file, 0.15, 0.25, 0)
    (root / "annotations" / "val_meta.list").unlink()
    with pytest.raises(UserError, match=r"val_meta.list is missing beside train_meta"):
        few_shot(file, 0.15, 0.25, 0)
