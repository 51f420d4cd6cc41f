"""The loaders that are compared give the same batches, and the measurements are there."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import data


@pytest.mark.parametrize("task", data.TASKS)
def test_all_three_read_the_same_images_into_the_same_pixels(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # timm leaves out the last batch of training if it is short.
    monkeypatch.setattr(data, "BATCH", 8)
    (width, height), size, whole, training = data.TASKS[task]
    root = data.folder(tmp_path / "images", 8, width, height)
    batches = {name: list(make(root, size, whole, training, 0)()) for name, make in data.LOADERS.items()}
    for each in batches.values():
        assert [tuple(images.shape) for images, _ in each] == [(8, 3, size, size)]
        assert sorted(each[0][1].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    if not training:
        assert torch.allclose(batches["ours"][0][0], batches["torchvision"][0][0], atol=1e-6)
        # timm rounds the size that the crop is taken from in another way.
        assert torch.allclose(batches["ours"][0][0].mean(), batches["timm"][0][0].mean(), atol=0.02)


def test_what_is_committed_has_every_loader_and_task() -> None:
    found = json.loads(data.RESULT.read_text())["median images a second"]
    assert len(found) == 3 * len(data.TASKS)
    assert all(set(values) == set(data.LOADERS) for values in found.values())
