"""A file is there as a whole or not at all."""

from pathlib import Path

import pytest

from snell_lightning.adapters.whole import remove_parts, whole


def test_the_old_file_stays_until_the_new_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "some.txt"
    with whole(path) as part:
        part.write_text("old")
        assert not path.exists()
    with whole(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("old")
    with pytest.raises(TypeError), whole(path) as part, part.open("w") as file:
        file.writelines(["ne", None])  # type: ignore[list-item]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_the_disk_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as caught, whole(tmp_path / "some.txt"):
        tmp_path.write_text("")
    assert caught.value.filename == str(tmp_path / "some.txt")


def test_what_killed_writers_have_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".last.ckpt.12.part", ".adapter.safetensors.99.part", "last.ckpt", ".unfinished", "mine.part"):
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", ".unfinished", "mine.part"}
