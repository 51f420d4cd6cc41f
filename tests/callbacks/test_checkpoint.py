"""Checkpoints and the adapter file: which epoch they are of, and what a resumed run takes over."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from snell_lightning.adapters import adapter_state_dict, read_adapter
from snell_lightning.callbacks import AdapterCheckpoint
from snell_lightning.callbacks.resuming import _random_state, _set_random_state

from .conftest import MakeTrainer, loader, make_classifier


class Scores(Callback):
    """Gives each epoch a made-up validation score and remembers the tensors it ended with."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores
        self.tensors: dict[int, dict[str, torch.Tensor]] = {}

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("score", self.scores[trainer.current_epoch])
        state = adapter_state_dict(pl_module.model)  # type: ignore[arg-type]
        self.tensors[trainer.current_epoch] = {name: tensor.clone() for name, tensor in state.items()}


def fit(make_trainer: MakeTrainer, folder: Path, *scores: float, resume: Path | None = None, **options: Any) -> Scores:
    """Train for as many epochs as there are scores."""
    watch, save = Scores(*scores), AdapterCheckpoint(monitor="score", **options)
    trainer = make_trainer(
        default_root_dir=folder, max_epochs=len(scores), callbacks=[watch, save], enable_checkpointing=True
    )
    trainer.fit(make_classifier(), loader(2), loader(1), ckpt_path=resume, weights_only=True)
    return watch


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("scores", "best"), [((0.2, 0.9, 0.5), 1), ((0.9, 0.2, 0.5), 0), ((0.1, 0.2, 0.3), 2), ((0.9, 0.9, 0.5), 1)]
)
def test_the_adapter_is_that_of_the_best_epoch(
    scores: tuple[float, ...], best: int, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    watch = fit(make_trainer, tmp_path, *scores)
    tensors, metadata = read_adapter(tmp_path / "adapter.safetensors")
    assert metadata["epoch"] == best
    assert metadata["score"] == pytest.approx(scores[best])
    assert tensors.keys() == watch.tensors[best].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, watch.tensors[best][name]), name
    assert set(files(tmp_path / "checkpoints")) == {f"epoch={best}.ckpt", "last.ckpt"}
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 2
    for name, tensor in watch.tensors[2].items():
        assert torch.equal(last["state_dict"][f"model.{name}"], tensor), name


def test_a_run_that_ends_before_its_first_validation_leaves_its_last_adapter(
    tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    module = make_classifier()
    save = AdapterCheckpoint(monitor="score")
    trainer = make_trainer(
        default_root_dir=tmp_path, max_epochs=2, max_steps=1, callbacks=[Scores(0.5), save], enable_checkpointing=True
    )
    trainer.fit(module, loader(3), loader(1))
    tensors, metadata = read_adapter(tmp_path / "adapter.safetensors")
    assert "score" not in metadata
    for name, tensor in adapter_state_dict(module.model).items():
        assert torch.equal(tensors[name], tensor), name


def test_as_many_of_the_best_are_kept_as_asked_for(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    fit(make_trainer, tmp_path, 0.2, 0.9, 0.5, save_top_k=2)
    assert set(files(tmp_path / "checkpoints")) == {"epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"}


def test_without_a_monitored_value_the_last_epoch_is_the_best(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    save = AdapterCheckpoint(monitor=None)
    trainer = make_trainer(default_root_dir=tmp_path, max_epochs=2, callbacks=[save], enable_checkpointing=True)
    trainer.fit(make_classifier(), loader(1))
    _, metadata = read_adapter(tmp_path / "adapter.safetensors")
    assert metadata["epoch"] == 1


def test_a_resumed_run_in_a_new_folder_takes_the_best_over_and_leaves_the_old_one_alone(
    tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    watch = fit(make_trainer, old, 0.2, 0.9)
    before = files(old)
    fit(make_trainer, new, 0.2, 0.9, 0.5, resume=old / "checkpoints" / "last.ckpt")
    assert files(old) == before
    # Epoch 2 is no better than epoch 1 of the first run, whose adapter is the result still.
    tensors, metadata = read_adapter(new / "adapter.safetensors")
    assert metadata["epoch"] == 1
    for name, tensor in tensors.items():
        assert torch.equal(tensor, watch.tensors[1][name]), name
    assert set(files(new / "checkpoints")) == {"epoch=1.ckpt", "last.ckpt"}
    assert torch.load(new / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2


def test_a_better_epoch_of_a_resumed_run_replaces_what_was_taken_over(
    tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    fit(make_trainer, old, 0.2, 0.5)
    before = files(old)
    watch = fit(make_trainer, new, 0.2, 0.5, 0.9, resume=old / "checkpoints" / "last.ckpt")
    assert files(old) == before
    tensors, metadata = read_adapter(new / "adapter.safetensors")
    assert metadata["epoch"] == 2
    assert torch.equal(tensors["head.weight"], watch.tensors[2]["head.weight"])
    assert set(files(new / "checkpoints")) == {"epoch=2.ckpt", "last.ckpt"}


def test_evaluating_a_checkpoint_writes_nothing(tmp_path: Path, make_trainer: MakeTrainer) -> None:
    fit(make_trainer, tmp_path / "old", 0.5)
    here = tmp_path / "new"
    trainer = make_trainer(default_root_dir=here, callbacks=[AdapterCheckpoint()], enable_checkpointing=True)
    path = tmp_path / "old" / "checkpoints" / "last.ckpt"
    trainer.validate(make_classifier(), loader(1), ckpt_path=path, verbose=False, weights_only=True)
    assert not here.exists() or files(here) == {}


def test_a_trial_run_writes_nothing(tmp_path: Path, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trainer = make_trainer(callbacks=[AdapterCheckpoint()], enable_checkpointing=True, fast_dev_run=True)
    trainer.fit(make_classifier(), loader(1), loader(1))
    assert files(tmp_path) == {}


def draw() -> tuple[float, float, list[float]]:
    return random.gauss(0, 1), float(np.random.standard_normal()), torch.randn(3).tolist()


def test_random_states_round_trip_through_a_file_that_runs_no_code(tmp_path: Path) -> None:
    random.seed(3)
    np.random.seed(3)
    # Both generators make normal numbers in pairs and keep the second: it must be kept too.
    draw()
    torch.save({"processes": [_random_state()]}, tmp_path / "state.ckpt")
    expected = [draw(), draw()]
    _set_random_state(torch.load(tmp_path / "state.ckpt", weights_only=True)["processes"][0])
    assert [draw(), draw()] == expected


def test_the_state_of_the_generators_is_the_stopped_runs_when_training_goes_on(
    tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    drawn: dict[str, list[tuple]] = {}

    class Draws(Callback):
        def __init__(self, run: str) -> None:
            self.numbers = drawn.setdefault(run, [])

        def on_train_batch_start(self, *_: Any) -> None:
            self.numbers.append(draw())

    def run(name: str, epochs: int, resume: Path | None = None) -> None:
        options = {"default_root_dir": tmp_path / name, "max_epochs": epochs, "enable_checkpointing": True}
        trainer = make_trainer(callbacks=[Draws(name), AdapterCheckpoint(monitor=None)], **options)
        trainer.fit(make_classifier(), loader(2), ckpt_path=resume, weights_only=True)

    for name in ("whole", "part"):
        random.seed(1)
        np.random.seed(1)
        run(name, 2 if name == "whole" else 1)
    random.seed(9)
    np.random.seed(9)
    run("rest", 2, tmp_path / "part" / "checkpoints" / "last.ckpt")
    assert drawn["part"] + drawn["rest"] == drawn["whole"]
