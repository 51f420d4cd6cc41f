"""What is saved is what was scored: whenever validation runs, and whatever a callback does to the weights meanwhile."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from snell_lightning.adapters import read_adapter

from .conftest import QUICK, Command

RUN = Path("runs/version_0")
# A rate at which a step changes the score, and enough of them for several validations.
FIT = (
    *("fit", *QUICK, "--trainer.max_epochs", "3", "--trainer.limit_train_batches", "5", "--data.eval_batch_size", "32"),
    *("--model.optimizer.lr", "2e-2", "--trainer.num_sanity_val_steps", "0"),
)
LESS = ("--trainer.limit_train_batches", "2")
SCHEDULES = {
    "every second epoch": ("--trainer.check_val_every_n_epoch", "2"),
    "in the middle of an epoch": ("--trainer.val_check_interval", "0.6"),
    "by steps": ("--trainer.val_check_interval", "7", "--trainer.check_val_every_n_epoch", "null"),
    "by time": ("--trainer.val_check_interval", "{seconds: 0}", "--trainer.check_val_every_n_epoch", "null", *LESS),
    "all the same": ("--data.eval_batch_size", "1"),
    "the lowest loss": ("--checkpoint.monitor", "val/loss", "--checkpoint.mode", "min"),
    "stopped early": ("--trainer.max_steps", "8", "--trainer.val_check_interval", "3"),
}
AVERAGING = {
    "EMAWeightAveraging": {"decay": 0.5},
    "EMAWeightAveraging at epochs": {"decay": 0.5, "update_starting_at_step": 1000, "update_starting_at_epoch": 0},
    "WeightAveraging": {},
    "StochasticWeightAveraging": {"swa_lrs": 1e-2, "swa_epoch_start": 1},
}


def averaging(kind: str) -> tuple[str, ...]:
    """Options that switch a callback on."""
    name = kind.split()[0]
    callback = {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": AVERAGING[kind]}
    Path("averaging.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    return "--config", "averaging.yaml"


def require_what_was_scored(command: Command) -> None:
    """Adapter and best checkpoint have the same tensors, and these give the recorded score again."""
    (best,) = (RUN / "checkpoints").glob("epoch=*.ckpt")
    saved = torch.load(best, weights_only=True)
    tensors, metadata = read_adapter(RUN / "adapter.safetensors")
    assert all(torch.equal(tensor, saved["state_dict"][f"model.{name}"]) for name, tensor in tensors.items())
    done = command("validate", "--config", str(RUN / "config.yaml"))
    assert (done.status, done.errors) == (0, [])
    rows = [line.replace("│", " ").split() for line in done.out.splitlines() if "val/" in line]
    (name,) = (key for key in metadata if key.startswith("val/"))
    # The table has six decimals.
    assert dict(row for row in rows if len(row) == 2)[name] == f"{metadata[name]:.6f}"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_d1_the_adapter_has_the_score_that_is_recorded(schedule: str, command: Command) -> None:
    done = command(*FIT, *SCHEDULES[schedule])
    assert (done.status, done.errors) == (0, [])
    require_what_was_scored(command)


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [("EMAWeightAveraging", "each epoch"), *((kind, "in the middle of an epoch") for kind in AVERAGING)],
)
def test_d2_averaged_weights_are_saved_with_their_score(kind: str, schedule: str, command: Command) -> None:
    done = command(*FIT, *averaging(kind), *SCHEDULES.get(schedule, ()))
    assert (done.status, done.errors) == (0, [])
    require_what_was_scored(command)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested mappings and lists."""
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "WeightAveraging", "StochasticWeightAveraging"])
def test_d2_d12_a_checkpoint_with_averages_holds_what_is_trained_and_is_resumed(kind: str, command: Command) -> None:
    assert command(*FIT, *averaging(kind)).status == 0
    last = RUN / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    trained = {name: tensor.shape for name, tensor in saved["state_dict"].items()}
    count = sum(shape.numel() for shape in trained.values())
    # The weights, their average, two moments of Adam, and a handful of counters.
    random_states = sum(tensor.numel() for tensor in tensors_in(saved.pop("processes")))
    assert 4 * count <= sum(tensor.numel() for tensor in tensors_in(saved)) < 4 * count + 500
    assert random_states < 10_000

    again = command(*FIT, *averaging(kind), "--trainer.max_epochs", "4", "--ckpt_path", str(last))
    assert (again.status, again.errors) == (0, [])
    resumed = torch.load("runs/version_1/checkpoints/last.ckpt", weights_only=True)
    assert resumed["global_step"] == 20
    assert {name: tensor.shape for name, tensor in resumed["state_dict"].items()} == trained


def test_c3_averages_that_measure_frozen_statistics_anew_are_refused(command: Command) -> None:
    norms = ("--model.backbone", "test_efficientnet", "--model.pretrained", "false", "--model.backbone_args", "null")
    done = command(*FIT, *norms, *averaging("StochasticWeightAveraging"))
    assert done.status == 1
    assert "use lightning.pytorch.callbacks.WeightAveraging or EMAWeightAveraging" in done.errors[0]
    assert not Path("runs").exists()
