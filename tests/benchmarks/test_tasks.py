"""What the tasks are read from."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import tasks


def test_a_pickle_of_arrays_is_read_and_one_that_names_a_function_is_not() -> None:
    arrays = np.arange(12, dtype=np.uint8).reshape(3, 4)

    assert np.array_equal(tasks._Arrays(io.BytesIO(pickle.dumps(arrays))).load(), arrays)
    with pytest.raises(pickle.UnpicklingError, match="Path is not an array"):
        tasks._Arrays(io.BytesIO(pickle.dumps(Path("/")))).load()


def test_a_cut_out_lies_in_the_middle_of_a_white_square(tmp_path: Path) -> None:
    cut_out = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    cut_out.putpixel((0, 0), (0, 255, 0, 0))
    cut_out.save(tmp_path / "cut.png")

    square = tasks._on_white(tmp_path / "cut.png")

    assert square.shape == (8, 8, 3)
    assert (square[:2] == 255).all()
    assert square[2, 0].tolist() == [255, 255, 255]  # Transparent there.
    assert square[2, 1].tolist() == [255, 0, 0]


def test_photographs_are_labelled_by_their_folders_and_drawings_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "CACHE", tmp_path / "pretrained")
    root = tmp_path / "data" / "tuxpaint" / "usr" / "share" / "tuxpaint" / "stamps"
    files = [
        "animals/birds/owl",
        "animals/birds/cartoon/owl",
        "food/fruit/pear",
        "food/fruit/pear_mirror",
        "sports/ball",
    ]
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 5), "red").save(root / f"{file}.png")

    pictures, labels = tasks.TASKS["photos"].load()

    assert len(pictures) == 3
    names = list(tasks._PHOTOS)
    assert [names[label] for label in labels] == ["birds", "fruit and nuts", "things"]
