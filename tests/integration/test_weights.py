"""A backbone's weights from a file: tuned, tested and used, also where the file has moved."""

from pathlib import Path

import pytest
import torch

from snell_lightning.backbones import EMBEDDED_BACKBONE, create_backbone

from .conftest import Command
from .test_own_folders import BASE, COLOURS, FAST, FIT, accuracy, paint, predicted

PREDICT = ("predict", "--adapter", "runs/version_0/adapter.safetensors", "--images", "photos", "--output", "p.csv")


def test_a_run_on_weights_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    for name, colour in COLOURS.items():
        paint(tmp_path / "photos" / name, colour, 30)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    state = create_backbone(EMBEDDED_BACKBONE, 10).state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, "w.pth.tar")

    done = command(*FIT, "--model.weights", "w.pth.tar")

    assert (done.status, done.errors) == (0, [])
    run = ("--config", "runs/version_0/config.yaml")
    assert accuracy(command("test", *FAST, *run).out) > 0.9

    moved = Path("w.pth.tar").rename("elsewhere.pth")
    for arguments in (("test", *FAST, *run), PREDICT):
        refused = command(*arguments)
        assert refused.status == 1
        assert len(refused.errors) == 1
        assert "w.pth.tar" in refused.errors[0]
    assert accuracy(command("test", *FAST, *run, "--model.weights", str(moved)).out) > 0.9
    adapter = ("--model.adapter_file", "runs/version_0/adapter.safetensors")
    assert accuracy(command("test", *BASE, *FAST, *adapter, "--model.weights", str(moved)).out) > 0.9
    command(*PREDICT, "--weights", str(moved))
    found = predicted(Path("p.csv"))
    assert sum(kind == Path(image).parent.name for image, kind in found.items()) > 0.9 * len(found) > 80
    merged = command("merge", *PREDICT[1:3], "--output", "merged", "--weights", str(moved))
    assert (merged.status, merged.errors) == (0, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.weights", "nothing.pth"), "there is no file"),
        (("--model.weights", "w.pth", "--model.pretrained", "false"), "leave one of them out"),
        (("--model.weights", "w.pth"), "is no file of weights"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.pth").write_text("<html>")

    done = command("fit", "--config", "vit.yaml", *FAST, *options)

    assert done.status == 1
    assert len(done.errors) == 1
    assert message in done.errors[0]
    assert not Path("runs").exists()
