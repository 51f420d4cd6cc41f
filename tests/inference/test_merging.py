"""`merge`: what other software reads gives the tuned model's logits, or is not written at all."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from snell_lightning import load_classifier
from snell_lightning.adapters import deltas
from snell_lightning.cli import main
from snell_lightning.inference import merging

from .conftest import save, tuned

# Small models of six families, from local folders with their weights, as pretrained ones come.
FAMILIES = {
    "vit": ("test_vit", {}, 160),
    "deit-distilled": (
        "deit_tiny_distilled_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
        32,
    ),
    "eva02": ("eva02_tiny_patch14_224", {"img_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 3}, 28),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 4)},
        32,
    ),
    "convnext": ("test_convnext", {}, 64),
    "efficientnet": ("test_efficientnet", {}, 64),
}
Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs `merge` and gives what it said; with `fails` the line of its error."""

    def merge(*arguments: object, fails: bool = False) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["merge", *map(str, arguments)])
        said = capsys.readouterr()
        assert bool(ended.value.code) == fails, said.err
        return said.err.strip().splitlines()[-1]

    return merge


def pretrained_folder(folder: Path, family: str) -> str:
    """A folder with a small model and weights, all of which reach the logits."""
    name, arguments, size = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **arguments)
    for parameter in model.parameters():
        if parameter.ndim <= 1:
            nn.init.uniform_(parameter, 0.2, 1.0)
    timm.models.save_for_hf(
        model, str(folder), model_args=arguments, safe_serialization=True, data_config={"input_size": (3, size, size)}
    )
    return f"local-dir:{folder}"


def family_adapter(family: str, photos: Path, folder: Path) -> Path:
    """The adapter file of a short run on such a model."""
    arguments = {
        "--config": "vit.yaml", "--data.source": "folder", "--data.root": photos, "--data.batch_size": 4,
        "--model.backbone": pretrained_folder(folder / "pretrained", family), "--model.optimizer.lr": 3e-2,
        "--trainer.max_epochs": 2, "--trainer.accelerator": "cpu", "--trainer.logger.save_dir": folder / "runs",
        "--trainer.enable_progress_bar": "false", "--report.pictures": "false",
    }  # fmt: skip
    main(["fit", *(str(text) for pair in arguments.items() for text in pair)])
    return folder / "runs" / "version_0" / "adapter.safetensors"


def images(photos: Path, file: Path) -> Tensor:
    """All images, as the tuned model sees them."""
    classifier = load_classifier(file, "cpu")
    return torch.stack([classifier.transform(merging.as_picture(path)) for path in sorted(photos.rglob("*.png"))])


def logits(model: Callable[[Tensor], Tensor], seen: Tensor) -> Tensor:
    """In evaluation, 16 images at once."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in seen.split(16)])


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_a_family(
    run: Run, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    """Fit, merge, read by timm and by onnxruntime, and predict: all say the same."""
    file = family_adapter(family, photos, tmp_path)
    capsys.readouterr()
    seen = images(photos, file)
    tuned_model = load_classifier(file, "cpu")
    expected = logits(tuned_model.model, seen)
    assert (expected - logits(merging._without_update(tuned_model), seen)).abs().max() > 1e-2, "nothing was tuned"
    allowed = 1e-4 * max(1.0, float(expected.abs().max()))

    run("--adapter", file, "--output", tmp_path / "plain")
    run("--adapter", file, "--output", tmp_path / "onnx", "--format", "onnx")

    plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True).eval()
    torch.testing.assert_close(logits(plain, seen), expected, rtol=0, atol=allowed)
    onnx = merging._read_onnx(tmp_path / "onnx")
    torch.testing.assert_close(logits(onnx, seen), expected, rtol=0, atol=allowed)
    # A thousand images of one family, and all there are of the others.
    times = 25 if family == "swin" else 1
    many = tmp_path / "many"
    many.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png")) * times):
        os.link(path, many / f"{number:04}.png")
    with pytest.raises(SystemExit):
        main(["predict", "--adapter", str(file), "--images", str(many), "--output", str(tmp_path / "all.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    likely, places = logits(plain, seen).softmax(-1).repeat(times, 1).topk(5)
    assert len(rows) == len(places) == 40 * times
    names = plain.pretrained_cfg["label_names"]
    assert [row["classes"][0] for row in rows] == [names[row[0]] for row in places.tolist()]
    torch.testing.assert_close(torch.tensor([row["probabilities"] for row in rows]), likely, rtol=1e-3, atol=1e-5)


def test_where_this_package_is_missing_timm_reads_the_embedded_backbone(
    run: Run, adapter: Path, photos: Path, tmp_path: Path
) -> None:
    said = run("--adapter", adapter, "--output", tmp_path / "plain")

    assert said.startswith(f"merged: {tmp_path / 'plain'} (timm, float32); on 16 images its logits differ")
    code = f"""
import json, sys, timm, torch
from PIL import Image
model = timm.create_model("local-dir:{tmp_path / "plain"}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
files = {sorted(map(str, photos.rglob("*.png")))}
with torch.no_grad():
    found = model(torch.stack([transform(Image.open(file).convert("RGB")) for file in files])).softmax(-1)
assert "snell_lightning" not in sys.modules
print(json.dumps([model.pretrained_cfg["label_names"][row.argmax()] for row in found]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    expected = load_classifier(adapter, "cpu").predict(sorted(photos.rglob("*.png")))
    assert json.loads(done.stdout) == [prediction.label for prediction in expected]


@pytest.mark.parametrize("augmentation", ["crop", "light"])
def test_timms_own_transform_gives_the_same_image(run: Run, photos: Path, tmp_path: Path, augmentation: str) -> None:
    file = save(tmp_path / "adapter.safetensors", tuned(photos), photos, augmentation)

    run("--adapter", file, "--output", tmp_path / "plain", "--images", photos)

    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["label_names"] == [f"digit {label}" for label in range(10)]
    assert config["pretrained_cfg"]["crop_mode"] == {"crop": "center", "light": "squash"}[augmentation]


def test_torch_export_takes_any_batch(run: Run, adapter: Path, photos: Path, tmp_path: Path) -> None:
    run("--adapter", adapter, "--output", tmp_path / "exported", "--format", "torch_export")

    seen = images(photos, adapter)
    exported = torch.export.load(tmp_path / "exported" / "model.pt2").module()
    expected = load_classifier(adapter, "cpu").model
    for batch in (seen[:1], seen[:7]):
        torch.testing.assert_close(exported(batch), logits(expected, batch), rtol=1e-4, atol=1e-4)


def test_onnx_has_the_weights_of_a_large_model_in_a_file_of_their_own(
    run: Run, adapter: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_ONE_FILE", 2**20)

    run("--adapter", adapter, "--output", tmp_path / "large", "--format", "onnx")

    assert (tmp_path / "large" / "model.onnx").stat().st_size < 2**20
    seen = images(photos, adapter)
    expected = logits(load_classifier(adapter, "cpu").model, seen)
    found = logits(merging._read_onnx(tmp_path / "large"), seen)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


class TestLowerPrecision:
    def test_an_update_that_it_loses_is_refused_with_the_figure(self, run: Run, photos: Path, tmp_path: Path) -> None:
        module = tuned(photos)
        # One hundredth of the spacing of bfloat16 at the weights' size.
        for delta in deltas(module.model).values():
            delta.out_factors.data.mul_(1e-4)
            delta.in_factors.data.mul_(1e-4)
        file = save(tmp_path / "adapter.safetensors", module, photos)

        said = run("--adapter", file, "--output", tmp_path / "plain", "--precision", "bfloat16", fails=True)

        assert said.startswith("error: bfloat16 loses the update: it changes the logits by ")
        assert said.endswith("keep float32")
        assert not (tmp_path / "plain").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]

    def test_where_the_update_survives_it_is_written(
        self, run: Run, adapter: Path, photos: Path, tmp_path: Path
    ) -> None:
        arguments = ("--adapter", adapter, "--images", photos, "--output", tmp_path / "plain")

        said = run(*arguments, "--precision", "bfloat16")

        assert "(timm, bfloat16)" in said
        with safe_open(tmp_path / "plain" / "model.safetensors", framework="pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118

    def test_a_linear_probe_has_its_head_to_lose_and_nothing_else(self, run: Run, photos: Path, tmp_path: Path) -> None:
        file = save(tmp_path / "adapter.safetensors", tuned(photos, config=None), photos)
        arguments = ("--adapter", file, "--images", photos, "--output", tmp_path / "plain")

        said = run(*arguments, "--precision", "bfloat16")

        assert "(timm, bfloat16)" in said


def test_the_card_has_what_hubs_read_and_its_code_runs(
    run: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--adapter", adapter, "--output", tmp_path / "plain")

    text = (tmp_path / "plain" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    facts = yaml.safe_load(head)
    assert (facts["library_name"], facts["pipeline_tag"]) == ("timm", "image-classification")
    assert "digit 0, digit 1" in body
    code = body.split("```python\n")[1].split("```")[0].replace("PATH", str(tmp_path / "plain"))
    scope: dict = {}
    exec(code, scope)
    assert len(code.splitlines()) == 3
    assert scope["model"].num_classes == 10


def test_a_pretrained_model_on_the_hub_is_the_base_model() -> None:
    class Tuned:
        backbone_name = "vit_base_patch16_224"
        model = timm.create_model("vit_base_patch16_224.augreg_in21k", img_size=32, depth=1)

    from snell_lightning.inference.card import _base_model

    assert _base_model(Tuned()) == "timm/vit_base_patch16_224.augreg_in21k"
    Tuned.backbone_name = "hf-hub:some/model"
    assert _base_model(Tuned()) == "some/model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: --output"),
        (("--output", "."), "--output . exists; name a folder that does not"),
        (("--output", "x", "--format", "onnx", "--precision", "bfloat16"), "goes with --format timm"),
        (("--output", "x", "--format", "tflite"), "invalid choice: 'tflite'"),
        (("--output", "x", "--images", "nothing"), "no match for --images nothing"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    run: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").touch()

    assert message in run("--adapter", adapter, *arguments, fails=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_is_not_the_tuned_model_is_not_written(
    run: Run, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(tuned, folder: Path, job) -> None:
        with torch.no_grad():
            tuned.model.head.bias.add_(1e-2)
        write(tuned, folder, job)

    write, read = merging._FORMATS["timm"]
    monkeypatch.setitem(merging._FORMATS, "timm", (damaged, read))

    said = run("--adapter", adapter, "--output", tmp_path / "plain", fails=True)

    assert "the merged model's logits differ by 1.0" in said
    assert list(tmp_path.iterdir()) == []
