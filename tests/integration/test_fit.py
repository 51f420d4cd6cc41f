"""Train, test and predict with the embedded backbone and the embedded data: what a run leaves behind."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from snell_lightning import ImageClassifier, ImageDataModule, SnellConfig, load_adapter
from snell_lightning.adapters import deltas, inject, read_adapter
from snell_lightning.backbones import EMBEDDED_BACKBONE
from snell_lightning.cli import SHIPPED_CONFIGS

from .conftest import QUICK, Command, Trained

# Logged names that other programs may rely on, besides one of each layer.
LOGGED = {
    "train/loss", "val/loss", "val/acc1", "val/acc5", "lr", "sparsity/ratio", "memory/allocated_mib", "memory/peak_mib",
    "memory/weights_mib", "memory/gradients_mib", "memory/optimizer_mib", "memory/activations_mib",
    "throughput/images_per_second",
}  # fmt: skip
LAYERS = [f"blocks.{block}.{layer}" for block in range(4) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
RUN = Path("runs/version_0")
# What the shipped job says about the model.
VIT = yaml.safe_load((SHIPPED_CONFIGS / "vit.yaml").read_text())["model"]
BEST = "epoch=*.ckpt"


def best_checkpoint(run: Path) -> Path:
    (path,) = (run / "checkpoints").glob(BEST)
    return path


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def lightning_score(out: str, name: str) -> float:
    """A value from the table that is printed after `validate` and `test`."""
    (line,) = (line for line in out.splitlines() if name in line)
    return float(line.replace("│", " ").split()[-1])


@pytest.fixture(scope="module")
def curves(trained: Trained) -> EventAccumulator:
    events = EventAccumulator(str(trained.folder / RUN))
    events.Reload()
    return events


def test_every_promised_value_is_logged(curves: EventAccumulator) -> None:
    expected = LOGGED | {f"sparsity/{layer}" for layer in LAYERS}
    assert expected <= set(curves.Tags()["scalars"])


def test_logged_values_are_plausible(curves: EventAccumulator) -> None:
    last = {name: curves.Scalars(name)[-1].value for name in LOGGED}
    assert last["sparsity/ratio"] == pytest.approx(VIT["adapter"]["sparsity"], abs=0.01)
    assert 0 <= last["val/acc1"] <= last["val/acc5"] <= 1
    assert last["memory/peak_mib"] >= last["memory/allocated_mib"] > last["memory/weights_mib"] > 0
    # Adam keeps two numbers for each trained one.
    assert last["memory/optimizer_mib"] == pytest.approx(2 * last["memory/gradients_mib"], rel=0.01)
    assert last["memory/activations_mib"] > 0
    assert last["throughput/images_per_second"] > 0


def test_the_adapter_file_is_small_and_says_what_it_belongs_to(trained: Trained) -> None:
    path = trained.folder / RUN / "adapter.safetensors"
    _, metadata = read_adapter(path)
    # The backbone alone is 4.1 MB.
    assert path.stat().st_size < 250_000
    assert metadata["backbone"] == EMBEDDED_BACKBONE
    assert (metadata["config"]["rank"], metadata["config"]["sparsity"]) == (2, VIT["adapter"]["sparsity"])
    assert metadata["classes"] == list("0123456789")
    assert metadata["normalization"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert metadata["image_size"] == 32
    assert metadata["fingerprint"] == load(trained.folder / RUN / "checkpoints" / "last.ckpt")["snell"]["fingerprint"]


def test_the_adapter_file_makes_a_fresh_backbone_the_model_of_the_best_checkpoint(trained: Trained) -> None:
    run = trained.folder / RUN
    fresh = timm.create_model(EMBEDDED_BACKBONE, pretrained=True, num_classes=10).eval()
    metadata = load_adapter(run / "adapter.safetensors", fresh, EMBEDDED_BACKBONE)
    best = ImageClassifier.load_from_checkpoint(best_checkpoint(run), weights_only=True).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(fresh(images), best(images))
    assert metadata["epoch"] == load(best_checkpoint(run))["epoch"]


def test_checkpoints_hold_no_frozen_weight_and_plain_settings_alone(trained: Trained) -> None:
    model = timm.create_model(EMBEDDED_BACKBONE, pretrained=False, num_classes=10)
    inject(model, SnellConfig(rank=2))
    tuned = {f"model.{name}" for name, parameter in model.named_parameters() if parameter.requires_grad}
    for path in (trained.folder / RUN / "checkpoints").iterdir():
        checkpoint = load(path)
        assert set(checkpoint["state_dict"]) == tuned, path.name
        assert path.stat().st_size < 1_500_000
        # Plain values are those that come out of YAML as they went in.
        settings = {key: value for key, value in checkpoint["hyper_parameters"].items() if not key.startswith("_")}
        assert yaml.safe_load(yaml.safe_dump(settings)) == settings
        assert settings["adapter"]["rank"] == 2
        assert settings["optimizer"]["init_args"]["lr"] == VIT["optimizer"]["init_args"]["lr"]


def test_the_summary_says_what_came_out_and_where_it_is(trained: Trained) -> None:
    for expected in (
        "best val/acc1",
        "selected on validation data",
        "trained parameters",
        "of 1,0",
        "sparsity of the updates",
        "peak memory",
        "kept for backward",
        "adapter.safetensors",
        "last.ckpt",
        "tensorboard --logdir runs/version_0",
    ):
        assert expected in trained.out.replace("\n", ""), expected


def test_the_saved_config_runs_again(work: Path, command: Command) -> None:
    again = command("fit", "--config", str(RUN / "config.yaml"), "--trainer.max_epochs", "1")
    assert (again.status, again.errors) == (0, [])
    first, second = (yaml.safe_load((work / "runs" / f"version_{n}" / "config.yaml").read_text()) for n in (0, 1))
    assert (first["trainer"].pop("max_epochs"), second["trainer"].pop("max_epochs")) == (2, 1)
    assert first == second


def test_predict_writes_one_line_per_test_image_in_order(work: Path, command: Command) -> None:
    checkpoint = best_checkpoint(RUN)
    # The rank is not given: it is the checkpoint's.
    done = command("predict", "--config", "vit.yaml", "--ckpt_path", str(checkpoint), "--data.eval_batch_size", "256")
    assert (done.status, done.errors) == (0, [])
    with (work / "runs" / "predict_0" / "predictions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))

    data = ImageDataModule(eval_batch_size=256, augmentation="light")
    module = ImageClassifier.load_from_checkpoint(checkpoint, weights_only=True).eval()
    with torch.no_grad():
        probabilities = torch.cat([module(images).softmax(-1) for images, _ in data.test_dataloader()])
    assert [line["image"] for line in lines] == [str(index) for index in range(len(data.splits.test))]
    assert [line["class"] for line in lines] == [data.class_names[label] for label in probabilities.argmax(-1)]
    np.testing.assert_allclose([float(line["probability"]) for line in lines], probabilities.amax(-1), atol=2e-6)


def test_test_gives_the_same_score_from_checkpoint_and_adapter_file_and_a_count_by_hand(
    work: Path, command: Command
) -> None:
    options = ("--config", "vit.yaml", "--trainer.limit_test_batches", "3", "--data.eval_batch_size", "30")
    checkpoint = best_checkpoint(RUN)
    tested = command("test", *options, "--ckpt_path", str(checkpoint))
    from_file = command(
        "test", *options, "--model.adapter.rank", "2", "--model.adapter_file", str(RUN / "adapter.safetensors")
    )
    assert (tested.status, from_file.status) == (0, 0), tested.err + from_file.err

    data = ImageDataModule(eval_batch_size=90, augmentation="light")
    images, labels = next(iter(data.test_dataloader()))
    module = ImageClassifier.load_from_checkpoint(checkpoint, weights_only=True).eval()
    with torch.no_grad():
        accuracy = float((module(images).argmax(-1) == labels).float().mean())
    assert lightning_score(tested.out, "test/acc1") == pytest.approx(accuracy, abs=1e-6)
    assert lightning_score(from_file.out, "test/acc1") == pytest.approx(accuracy, abs=1e-6)


def test_b6_test_prints_a_table_of_its_own(work: Path, command: Command) -> None:
    done = command("test", "--config", "runs/version_0/config.yaml", "--data.on_bad_image", "skip")
    score = lightning_score(done.out, "test/acc1")
    assert f"{round(score * 449)} of 449 images (test)" in done.out
    assert "runs/version_0/adapter.safetensors" in done.out
    assert "DataLoader 0" not in done.out


def test_validate_gives_the_score_of_the_run(work: Path, command: Command) -> None:
    done = command("validate", *QUICK, "--ckpt_path", str(best_checkpoint(RUN)))
    assert (done.status, done.errors) == (0, [])
    _, metadata = read_adapter(RUN / "adapter.safetensors")
    assert lightning_score(done.out, "val/acc1") == pytest.approx(metadata["val/acc1"], abs=1e-6)


def test_evaluation_leaves_no_checkpoint_and_no_adapter_of_its_own(work: Path, command: Command) -> None:
    done = command("validate", *QUICK, "--ckpt_path", str(best_checkpoint(RUN)))
    assert done.status == 0
    assert [
        path for path in (work / "runs" / "validate_0").rglob("*") if path.suffix in (".ckpt", ".safetensors")
    ] == []


def test_configs_are_merged_from_left_to_right_and_callbacks_are_set_by_name(work: Path, command: Command) -> None:
    Path("first.yaml").write_text("model:\n  adapter:\n    rank: 4\n    sparsity: 0.5\n")
    Path("second.yaml").write_text("model:\n  adapter:\n    sparsity: 0.7\ntrainer:\n  precision: bf16-mixed\n")
    options = list(QUICK)
    del options[options.index("--model.adapter.rank") : options.index("--model.adapter.rank") + 2]
    done = command(
        "fit", *options, "--config", "first.yaml", "--config=second.yaml", "--checkpoint.save_top_k", "2",
        "--monitor.every_n_steps", "3", "--monitor.per_layer", "false",
    )  # fmt: skip
    assert (done.status, done.errors) == (0, [])
    run = work / "runs" / "version_1"
    _, metadata = read_adapter(run / "adapter.safetensors")
    # bf16-mixed keeps factors and head in fp32.
    config = metadata["config"]
    assert (config["rank"], config["sparsity"], config["scale"]) == (4, 0.7, "auto")
    assert {tensor.dtype for tensor in load(run / "checkpoints" / "last.ckpt")["state_dict"].values()} == {
        torch.float32
    }
    assert len(list((run / "checkpoints").glob(BEST))) == 2
    events = EventAccumulator(str(run))
    events.Reload()
    # Every third step, and the last, counted from 0.
    assert [event.step for event in events.Scalars("sparsity/ratio")] == [2, 3]
    assert all(0 < event.value < 10 for event in events.Scalars("train/loss"))
    assert "sparsity/blocks.0.attn.qkv" not in events.Tags()["scalars"]


def test_without_an_adapter_the_head_alone_is_trained(work: Path, command: Command) -> None:
    options = list(QUICK)
    del options[options.index("--model.adapter.rank") : options.index("--model.adapter.rank") + 2]
    done = command("fit", *options, "--model.adapter", "null")
    assert (done.status, done.errors) == (0, [])
    run = work / "runs" / "version_1"
    tensors, metadata = read_adapter(run / "adapter.safetensors")
    assert set(tensors) == {"head.weight", "head.bias"}
    assert metadata["config"] is None
    module = ImageClassifier(adapter=None, adapter_file=str(run / "adapter.safetensors"))
    assert not deltas(module.model)
    assert torch.equal(module.model.head.weight, tensors["head.weight"])
    events = EventAccumulator(str(run))
    events.Reload()
    assert "sparsity/ratio" not in events.Tags()["scalars"]


def test_as_a_program_it_prints_no_advertisement_and_no_traceback(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "snell_lightning", "fit", *QUICK, "--trainer.max_epochs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "Run finished" in done.stdout
    for unwanted in ("Tip:", "💡", "Traceback", "litlogger", "Lightning.ai", "Warning:"):
        assert unwanted not in printed, unwanted
    assert (tmp_path / RUN / "adapter.safetensors").is_file()
