"""The folder source: layouts, determinism, and a line for every mistake."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.folder import folder
from snell_lightning.data.splits import Sample, Splits, open_image_file

MakeImages = Callable[[Mapping[str, int]], Path]


def read(root: Path | None, val: float = 0.25, test: float = 0.25, seed: int = 0) -> Splits:
    return folder(root, val, test, seed)


def names(root: Path, samples: Sequence[Sample]) -> list[str]:
    return [os.path.relpath(path, root) for path, _ in samples]


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_ready_splits_are_read_as_they_are(make_images: MakeImages, val: str) -> None:
    root = make_images({"train/b": 2, "train/a": 1, f"{val}/a": 1, f"{val}/b": 1, "test/b": 2})
    splits = read(root)
    assert splits.classes == ("a", "b")
    assert names(root, splits.train) == ["train/a/00.png", "train/b/00.png", "train/b/01.png"]
    assert [label for _, label in splits.train] == [0, 1, 1]
    assert names(root, splits.val) == [f"{val}/a/00.png", f"{val}/b/00.png"]
    assert splits.test == [(str(root / "test/b/00.png"), 1), (str(root / "test/b/01.png"), 1)]
    assert splits.open_image(splits.train[0][0]).mode == "RGB"


def test_a_missing_val_folder_is_split_off_train_and_a_missing_test_folder_stays_empty(
    make_images: MakeImages,
) -> None:
    splits = read(make_images({"train/a": 8, "train/b": 8}))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (12, 4, 0)
    assert [label for _, label in splits.val] == [0, 0, 1, 1]


def test_class_folders_are_split_by_class_without_overlap(make_images: MakeImages) -> None:
    splits = read(make_images({"a": 8, "b": 16}))
    parts = [splits.train, splits.val, splits.test]
    assert [len(part) for part in parts] == [12, 6, 6]
    assert [[label for _, label in part].count(0) for part in parts] == [4, 2, 2]
    assert len({path for part in parts for path, _ in part}) == 24


def test_the_split_depends_on_the_seed_alone(make_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_images({"a": 12, "b": 12})
    first = read(root)
    assert read(root, seed=1) != first
    walk, iterdir = os.walk, Path.iterdir
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((h, d, f[::-1]) for h, d, f in walk(*a, **k)))
    monkeypatch.setattr(Path, "iterdir", lambda path: reversed(list(iterdir(path))))
    assert read(root) == first


def test_hidden_and_foreign_files_are_left_out_and_nested_and_upper_case_ones_found(
    make_images: MakeImages,
) -> None:
    root = make_images({"train/a": 1, "train/a/deep": 1, "train/a/.cache": 1, "train/b": 1, "train/.git": 1})
    (root / "train/a/.00.png").write_bytes(b"")
    (root / "train/a/notes.txt").write_text("no image")
    (root / "train/b/00.png").rename(root / "train/b/00.PNG")
    make_images({"val/a": 1, "val/b": 1})
    splits = read(root)
    assert splits.classes == ("a", "b")
    assert names(root, splits.train) == ["train/a/00.png", "train/a/deep/00.png", "train/b/00.PNG"]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({}, r"images has no class folders; .*ROOT/CLASS/IMAGE"),
        ({"a": 5}, r"images has only one class folder, 'a'"),
        ({"train/a": 5}, r"images/train has only one class folder, 'a'"),
        ({"a": 5, "b": 0}, r"class folder .*images/b has no images \(\.jpg.*add some or remove"),
        ({"train/a": 2, "train/b": 2, "val/a": 0}, r"class folder .*images/val/a has no images"),
        ({"a": 5, "small": 2}, r"class 'small' \(2 images\) .* train, val, test: at least 3"),
        ({"train/a": 5, "train/small": 1}, r"class 'small' \(1 image\) .* train, val: at least 2"),
        ({"train/a": 2, "train/b": 2, "val/dog": 1}, r"images/val/dog is a class that train does not have"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "test/dog": 1}, r"images/test/dog is a class that train"),
        (
            {"train/a": 2, "train/b": 2, "val/a": 1, "valid/a": 1},
            r"the folders val and valid, which mean the same",
        ),
        ({"val/a": 2, "test/a": 2}, r"has a val or test folder and no train folder"),
        ({"train/a": 2, "train/b": 2, "val": 2}, r"images/val has no class folders"),
    ],
)
def test_each_mistake_in_the_layout_gets_one_line(
    make_images: MakeImages, counts: dict[str, int], expected: str
) -> None:
    root = make_images(counts)
    with pytest.raises(UserError, match=expected) as caught:
        read(root)
    assert "\n" not in str(caught.value)


def test_too_few_images_in_all_name_the_smallest_class(make_images: MakeImages) -> None:
    root = make_images({"train/a": 2, "train/b": 3})
    with pytest.raises(
        UserError, match=r"5 images of 2 classes are too few .*; the smallest class is 'a' \(2 images\)"
    ):
        read(root, val=0.8)


def test_a_missing_root_is_told_the_expected_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs data\.root; expected ROOT/train/CLASS/IMAGE"):
        read(None)
    with pytest.raises(UserError, match=r"nowhere does not exist; expected ROOT/train/CLASS/IMAGE"):
        read(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is not a folder; expected"):
        read(tmp_path / "file")


def test_image_files_of_other_modes_are_opened_as_rgb(make_images: MakeImages) -> None:
    path = make_images({"a": 1}) / "a/00.png"
    assert open_image_file(str(path)).getpixel((0, 0)) == (0, 0, 0)
    with open_image_file(str(path)) as image:
        image.convert("L").save(path)
    assert open_image_file(str(path)).mode == "RGB"
