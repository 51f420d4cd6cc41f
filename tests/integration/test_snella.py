"""SNELLA from the command line: the mixture kernel and the budget between layers, from training to a merged model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from snell_lightning.adapters import deltas, read_adapter
from snell_lightning.callbacks import AdapterEMA
from snell_lightning.cli import make_cli
from snell_lightning.inference.classifier import load_classifier

from .conftest import QUICK, Command

SNELLA = {
    "model": {"adapter": {"kernel": "mixture", "sparsifier": "magnitude", "sparsity": 0.05}},
    "trainer": {
        "max_epochs": 4,
        "callbacks": [
            {
                "class_path": "snell_lightning.callbacks.LayerBudget",
                "init_args": {"target_sparsity": 0.6, "final_epochs": 1},
            }
        ],
    },
}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "snella.yaml"
    file.write_text(yaml.safe_dump(SNELLA))
    return ("fit", *QUICK, "--config", str(file), "--trainer.max_epochs", "4")


def share(adapter: Path) -> float:
    """Part of all entries that survive, by the shares in an adapter file."""
    model = load_classifier(adapter).model
    updates = deltas(model).values()
    kept = sum((1 - delta.sparsity) * delta.in_features * delta.out_features for delta in updates)
    return kept / sum(delta.in_features * delta.out_features for delta in updates)


def test_a_run_ends_at_its_target_and_what_is_used_is_what_was_scored(command: Command, job: tuple[str, ...]) -> None:
    done = command(*job, "--checkpoint.monitor", "null")
    assert done.status == 0, done.err
    run = Path("runs/version_0")
    tensors, metadata = read_adapter(run / "adapter.safetensors")
    shares = metadata["shared_sparsity"]
    assert len(set(shares.values())) > 4
    assert share(run / "adapter.safetensors") == pytest.approx(0.4, abs=1e-3)
    assert [name for name in tensors if name.endswith(".alpha")]

    # The plain model that it becomes has the same zeros, and so has the checkpoint.
    done = command("merge", "--adapter", str(run / "adapter.safetensors"), "--output", "merged")
    assert done.status == 0, done.err
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["snell"]["shared_sparsity"] == shares
    for source in (
        ("--model.adapter_file", str(run / "adapter.safetensors")),
        ("--ckpt_path", str(run / "checkpoints/last.ckpt")),
    ):
        done = command("test", *QUICK, *source, "--trainer.limit_test_batches", "1")
        assert done.status == 0, done.err
    one, other = (path.read_text() for path in Path("runs").glob("test_*/metrics.csv"))
    assert one == other


class Recorded(Callback):
    """Remembers what is trained after each step, and how the copy's frozen tensors lie."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.shared: set[bool] = set()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        trained = {name: value.detach().clone() for name, value in pl_module.named_parameters() if value.requires_grad}
        self.steps.append(trained)
        (ema,) = (each for each in trainer.callbacks if isinstance(each, AdapterEMA))  # type: ignore[attr-defined]
        copies = dict(ema._average_model.module.named_parameters())
        own = dict(pl_module.named_parameters())
        self.shared |= {copies[name].data_ptr() == own[name].data_ptr() for name in own.keys() - trained.keys()}
        assert not [name for name in trained if copies[name].data_ptr() == own[name].data_ptr()]


def test_the_average_is_of_what_is_trained_and_frozen_weights_are_the_models_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ema = ("--trainer.callbacks+=snell_lightning.callbacks.AdapterEMA", "--trainer.callbacks.decay", "0.6")
    cli = make_cli([*QUICK, *ema], run=False)
    recorded = Recorded()
    cli.trainer.callbacks.append(recorded)
    frozen = cli.model.frozen_fingerprint
    cli.trainer.fit(cli.model, cli.datamodule)
    assert recorded.shared == {True}
    cli.model._frozen = None
    assert cli.model.frozen_fingerprint == frozen
    # After the last step the model holds the averages.
    for name, value in cli.model.named_parameters():
        if value.requires_grad:
            average = recorded.steps[0][name]
            for step in recorded.steps[1:]:
                average = torch.lerp(average, step[name], 0.4)
            torch.testing.assert_close(value.detach(), average, rtol=1e-6, atol=1e-8)


def test_too_few_epochs_are_one_line(command: Command, job: tuple[str, ...]) -> None:
    done = command(*job, "--trainer.max_epochs", "1")
    assert done.status == 1
    assert "expected at least one step in between" in done.errors[0]
