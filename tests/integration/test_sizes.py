"""Images that are no squares, from training to the merged model."""

from pathlib import Path

import pytest
import timm
import torch

from snell_lightning.adapters import read_adapter

from .conftest import Command
from .test_own_folders import BASE, COLOURS, FAST, FIT, accuracy, paint, predicted

MERGE = ("merge", "--adapter", "runs/version_0/adapter.safetensors", "--output", "merged")


@pytest.mark.parametrize("augmentation", ["crop", "none"])
def test_rectangles_are_tuned_tested_predicted_and_merged(
    augmentation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    for name, colour in COLOURS.items():
        paint(tmp_path / "photos" / name, colour, 30)
    monkeypatch.chdir(tmp_path)
    options = ("--data.augmentation", augmentation, "--data.image_size", "[32, 48]")

    done = command(*FIT, *options)

    assert (done.status, done.errors) == (0, [])
    assert read_adapter("runs/version_0/adapter.safetensors")[1]["image_size"] == [32, 48]
    tested = command("test", *FAST, "--config", "runs/version_0/config.yaml")
    assert accuracy(tested.out) > 0.9
    last = ("--ckpt_path", "runs/version_0/checkpoints/last.ckpt", "--data.image_size", "[32, 48]")
    tested = command("test", *BASE, *FAST, *last)
    assert accuracy(tested.out) > 0.9
    assert "in place of" not in tested.err
    tested = command("test", *BASE, *FAST, "--model.adapter_file", "runs/version_0/adapter.safetensors")
    assert accuracy(tested.out) > 0.9

    command("predict", "--adapter", "runs/version_0/adapter.safetensors", "--images", "photos", "--output", "p.csv")
    found = predicted(Path("p.csv"))
    assert sum(kind == Path(image).parent.name for image, kind in found.items()) > 0.9 * len(found) > 80

    # `merge` compares timm's own transform and logits with the tuned model's.
    merged = command(*MERGE)
    assert (merged.status, merged.errors) == (0, [])
    model = timm.create_model("local-dir:merged", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 3)


@pytest.mark.parametrize("size", ["[32]", "[32, 0]", "[32, 48, 3]", "0"])
def test_what_is_no_size_is_one_line(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(tmp_path)

    done = command("fit", "--config", "vit.yaml", "--data.image_size", size)

    assert done.status == 1
    assert len(done.errors) == 1
    assert "data.image_size" in done.errors[0]
