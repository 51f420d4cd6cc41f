"""Tiny generated image folders."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

MakeImages = Callable[[Mapping[str, int]], Path]


@pytest.fixture
def make_images(tmp_path: Path) -> MakeImages:
    """A function that fills folders below one root, given as `{"train/cat": 3}`, with numbered images."""

    def make(counts: Mapping[str, int]) -> Path:
        root = tmp_path / "images"
        root.mkdir(exist_ok=True)
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                Image.new("RGB", (20, 16), (number * 20, 0, 0)).save(root / folder / f"{number:02}.png")
        return root

    return make
