"""The folder source: layouts, determinism, and a line for every mistake."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.folder import folder
from snell_lightning.data.splits import Sample, Splits, _place

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
    splits = read(make_images({"train/a": 40, "train/b": 40}))
    assert len(splits.train) + len(splits.val) == 80
    # A share of 0.25 of 80 images that are drawn one by one: 20, give or take three times 3.9.
    assert 8 <= len(splits.val) <= 32
    assert {label for _, label in splits.val} == {0, 1}
    assert splits.test == []
    assert splits.by_fractions


def test_class_folders_are_split_without_overlap(make_images: MakeImages) -> None:
    splits = read(make_images({"a": 40, "b": 80}))
    parts = [splits.train, splits.val, splits.test]
    assert sum(map(len, parts)) == 120
    assert len({path for part in parts for path, _ in part}) == 120
    # Of 120 images 60, 30 and 30 are expected; the spread is 5.5 and 4.7.
    for part, expected in zip(parts, (60, 30, 30), strict=True):
        assert abs(len(part) - expected) <= 15


def test_the_split_depends_on_the_seed_alone(make_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_images({"a": 12, "b": 12})
    first = read(root)
    assert read(root, seed=1) != first
    scandir = os.scandir

    @contextmanager
    def reversed_scandir(path: str) -> Iterator[list[os.DirEntry]]:
        with scandir(path) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=True)

    monkeypatch.setattr(os, "scandir", reversed_scandir)
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
        ({"a": 5, "b": 0}, r"class folder .*images/b has no images; add some or remove the folder"),
        ({"train/a": 2, "train/b": 2, "val/a": 0}, r"class folder .*images/val/a has no images"),
        ({"a": 1, "b": 1}, r"2 images of 2 classes are too few to split 25% off for val; .*raise data.val_fraction"),
        ({"train/a": 2, "train/b": 2, "val/dog": 1}, r"images/val/dog is a class that train does not have"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "test/dog": 1}, r"images/test/dog is a class that train"),
        (
            {"train/a": 2, "train/b": 2, "val/a": 1, "valid/a": 1},
            r"the folders val and valid, which mean the same",
        ),
        ({"val/a": 2, "test/a": 2}, r"has a test and a val folder and no train folder; .*data.eval_split to all"),
        ({"train": 2, "test": 2}, r"images/test, .*images/train: images and no class folders"),
        ({"train": 2}, r"images/train: images and no class folders"),
        ({"wrapped/a": 2, "wrapped/b": 2}, r"only one class folder, 'wrapped'; .*; did you mean .*images/wrapped\?"),
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


def test_a_missing_root_is_told_the_expected_layout(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs data\.root; expected ROOT/train/CLASS/IMAGE"):
        read(None)
    with pytest.raises(UserError, match=r"nowhere does not exist; expected ROOT/train/CLASS/IMAGE"):
        read(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is not a folder; expected"):
        read(tmp_path / "file")


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", "Val", "Test"),
        ("Training", "Validation", "Testing"),
        ("train", "Valid", "TEST"),
        ("train", "dev", "testing"),
        ("training_set", "validation_set", "test_set"),
        ("TrainImages", "val-data", "test data"),
    ],
)
def test_a5_split_folders_are_recognised_in_any_case_and_usual_spelling(
    make_images: MakeImages, train: str, val: str, test: str
) -> None:
    splits = read(make_images({f"{part}/{name}": 1 for part in (train, val, test) for name in ("ant", "bee")}))
    assert splits.classes == ("ant", "bee")
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [2, 2, 2]
    assert not splits.by_fractions


def test_a5_what_is_not_used_beside_train_is_named(make_images: MakeImages) -> None:
    root = make_images({"train/a": 4, "train/b": 4, "val/a": 1, "extra/a": 2, "test": 3})
    (root / "loose.png").write_bytes(b"")
    assert read(root).notes[0] == "not used beside train/: extra/, test/ (no class folders), 1 files"
    assert read(root).test == []


@pytest.mark.parametrize("name", ["train", "test", "valid"])
def test_a5_a_class_of_a_splits_name_gets_a_line(make_images: MakeImages, name: str) -> None:
    splits = read(make_images({name: 9, "in" + name: 9}))
    assert set(splits.classes) == {name, "in" + name}
    assert splits.notes[0] == f"{name} is taken for a class, as it holds images and no class folders"


def test_classes_that_seem_to_be_one_level_further_down_get_a_line(make_images: MakeImages) -> None:
    splits = read(make_images({f"{year}/{name}": 9 for year in (2021, 2022) for name in ("ant", "bee")}))
    assert splits.notes[0] == "classes are 2021, 2022; the folders ant, bee in each are taken as one"


def sides(root: Path, **options: int) -> dict[str, str]:
    splits = read(root, **options)
    return {os.path.relpath(path, root): side for side in ("train", "val", "test") for path, _ in getattr(splits, side)}


def test_a3_no_image_changes_sides_when_others_are_added_or_removed(make_images: MakeImages) -> None:
    root = make_images({"ant": 40, "bee": 40})
    before = sides(root)
    (root / "ant/00.png").rename(root / "ant/new.png")
    for number in (3, 17, 31):
        (root / f"bee/{number:02}.png").unlink()
    make_images({"cat": 20})
    after = sides(root)
    kept = before.keys() & after.keys()
    assert len(kept) == 76
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}
    assert len(set(after.values())) == 3


def test_a3_the_split_is_the_same_on_every_machine_and_under_another_root(make_images: MakeImages) -> None:
    # blake2b of "0/ant/00.png", its first 8 bytes as a share of 2**64, and so on: computed with coreutils' b2sum -l 64.
    places = {"ant/00.png": 0.7924288954, "ant/01.png": 0.117519417, "ant/02.png": 0.848907145}
    for name, place in places.items():
        assert _place(name, 0) == pytest.approx(place, abs=1e-9)


def test_a10_every_class_has_an_image_in_every_split_if_it_has_three(make_images: MakeImages) -> None:
    root = make_images({**{f"big{n}": 100 for n in range(5)}, **{f"small{n}": 3 for n in range(5)}})
    splits = read(root, val=0.15)
    for part in (splits.train, splits.val, splits.test):
        assert {label for _, label in part} == set(range(10))
    assert splits.notes == ()
    # What was moved for that is written down, and given back it holds whatever is removed.
    assert splits.fixed
    before = sides(root, val=0.15)  # type: ignore[arg-type]
    gone = next(name for name, side in before.items() if name.startswith("small0") and side == "test")
    (root / gone).unlink()
    again = folder(root, 0.15, 0.25, 0, splits.fixed)
    assert [path for path, _ in again.train] == [path for path, _ in splits.train]
    assert again.notes == ("no test image of small0",)


def test_a10_classes_too_small_for_every_split_get_a_line(make_images: MakeImages) -> None:
    splits = read(make_images({"big": 30, "two": 2, "one": 1}))
    assert {label for _, label in splits.train} == {0, 1, 2}
    assert splits.notes == ("no val image of one", "no test image of one, two")
    ready = read(make_images({"x/train/a": 1, "x/train/b": 1, "x/val/a": 1, "x/test/b": 1}) / "x")
    assert ready.notes == ("no val image of b", "no test image of a")


def test_a8_what_pillow_reads_is_read_and_the_rest_counted_by_ending(make_images: MakeImages) -> None:
    root = make_images({"a": 4, "b": 4})
    image = Image.new("RGB", (8, 8))
    read_too = ("jfif", "jpe", "gif", "avif", "jp2", "webp", "tga", "JPG")
    for ending in read_too:
        image.save(root / f"a/other.{ending}")
    for name in ("1.xyz", "2.xyz", "notes.txt", "README"):
        (root / "b" / name).write_text("no image")
    splits = read(root)
    found = {Path(path).name for part in (splits.train, splits.val, splits.test) for path, _ in part}
    assert {f"other.{ending}" for ending in read_too} <= found
    assert splits.notes == ("left out by ending: 2 .xyz, 1 without ending, 1 .txt",)


def test_a8_a_class_of_nothing_that_can_be_read_says_what_was_left_out(make_images: MakeImages) -> None:
    root = make_images({"a": 4, "b": 0})
    (root / "b/1.xyz").write_text("no image")
    with pytest.raises(UserError, match=r"images/b has no images that can be read \(1 \.xyz are left out\); add some"):
        read(root)


def test_a9_a_link_to_a_folder_above_or_beside_adds_no_image_and_one_to_elsewhere_does(make_images: MakeImages) -> None:
    root = make_images({"ant": 4, "bee": 4, "../elsewhere": 3})
    os.symlink("..", root / "ant/up")
    os.symlink("../bee", root / "ant/beside")
    os.symlink("00.png", root / "ant/again.png")
    os.symlink("../../elsewhere", root / "ant/more")
    splits = read(root)
    found = sorted(os.path.relpath(path, root) for part in (splits.train, splits.val, splits.test) for path, _ in part)
    assert found == sorted(
        [f"{name}/{n:02}.png" for name in ("ant", "bee") for n in range(4)] + [f"ant/more/{n:02}.png" for n in range(3)]
    )
    assert splits.notes == ("left out 3 links to images and folders that are listed already",)


def test_a9_junk_folders_are_left_out_at_every_level(make_images: MakeImages) -> None:
    counts = {"ant": 3, "bee": 3, "ant/@eaDir": 2, "__MACOSX/ant": 2, "bee/.thumbnails": 2, "#recycle": 1}
    splits = read(make_images(counts))
    assert splits.classes == ("ant", "bee")
    assert sum(len(part) for part in (splits.train, splits.val, splits.test)) == 6


def test_class_folders_that_are_links_are_followed(make_images: MakeImages) -> None:
    root = make_images({"pool/1": 3, "pool/2": 3, "x/train": 0})
    os.symlink("../../pool/1", root / "x/train/ant")
    os.symlink("../../pool/2", root / "x/train/bee")
    splits = read(root / "x")
    assert (splits.classes, len(splits.train) + len(splits.val)) == (("ant", "bee"), 6)


def test_accents_that_macos_writes_apart_name_the_same_class(make_images: MakeImages) -> None:
    apart, whole = "cafe\u0301", "caf\u00e9"
    splits = read(make_images({f"train/{apart}": 2, "train/tea": 2, f"val/{whole}": 1, "val/tea": 1}))
    assert splits.classes == (whole, "tea")
    assert len(splits.val) == 2


def test_labels_follow_the_models_classes_and_a_class_it_lacks_is_refused(make_images: MakeImages) -> None:
    splits = read(make_images({"train/bee": 2, "train/ant": 2, "val/ant": 1}))
    mapped = splits.with_classes(["bee", "cat", "ant"])
    assert mapped.classes == ("bee", "cat", "ant")
    assert [label for _, label in mapped.train] == [2, 2, 0, 0]
    assert [label for _, label in mapped.val] == [2]
    with pytest.raises(UserError, match="are of the classes ant, bee, and the model's are ant, wasp; give"):
        splits.with_classes(["ant", "wasp"])


def test_a9_links_that_lead_nowhere_stop_no_listing(make_images: MakeImages) -> None:
    root = make_images({"ant": 4, "bee": 4})
    os.symlink("itself", root / "ant/itself")
    os.symlink("gone", root / "ant/nowhere")
    os.symlink(".", root / "ant/here")
    splits = read(root)
    assert len(splits.train) + len(splits.val) + len(splits.test) == 8
