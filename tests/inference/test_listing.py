"""Folders, files and patterns, each image once and in order."""

import os
from pathlib import Path

import pytest

from snell_lightning import UserError
from snell_lightning.inference.listing import list_images


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/10.png", "b/deep/er/1.jpg", "a/1.PNG", "a/notes.txt", "a/.hidden.png", "raw.dat"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def test_folders_are_taken_with_all_below_them_in_the_order_given() -> None:
    images, notes = list_images(["b", "a"])

    assert images == ["b/10.png", "b/2.png", "b/deep/er/1.jpg", "a/1.PNG"]
    assert notes == ["left out by ending: 1 .txt"]


def test_patterns_and_single_files_whatever_their_ending() -> None:
    assert list_images(["raw.dat", "b/*.png", "**/1.*"])[0] == [
        "raw.dat", "b/10.png", "b/2.png", "a/1.PNG", "b/deep/er/1.jpg",
    ]  # fmt: skip


def test_an_image_that_is_named_twice_counts_once() -> None:
    assert list_images(["b/2.png", "b", "b/*.png"])[0] == ["b/2.png", "b/10.png", "b/deep/er/1.jpg"]


def test_a_pattern_that_is_a_name_is_a_name() -> None:
    Path("[1].png").touch()

    assert list_images(["[1].png"])[0] == ["[1].png"]


def test_links_round_in_a_circle_end() -> None:
    os.symlink("..", "b/up")

    assert list_images(["b"])[0] == ["b/10.png", "b/2.png", "b/deep/er/1.jpg"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["c"], "no file, no folder and no match for --images c"),
        (["b/*.gif"], r"no match for --images b/\*.gif"),
        (["empty"], "there is no image in empty; left out by ending: 1 .txt"),
    ],
)
def test_nothing_is_an_error(given: list[str], message: str) -> None:
    Path("empty").mkdir()
    Path("empty/notes.txt").touch()

    with pytest.raises(UserError, match=message):
        list_images(given)
