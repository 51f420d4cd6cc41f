"""The comparison of methods, in part: two of them on a small task, with the backbone that ships with the package."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import accuracy, accuracy_table, tasks
from benchmarks.accuracy import Run
from benchmarks.pretrained import HALVES, write
from snell_lightning.backbones.embedded import EMBEDDED_WEIGHTS

METHODS = {"linear": "linear", "snell-8-0.9": accuracy.METHODS["snell-8-0.9"]}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One small task, and everything that is written goes to a folder of its own."""
    place = tmp_path / "backbone"
    write(place, "vit_micro_patch4_32", load_file(EMBEDDED_WEIGHTS), {**HALVES, "num_classes": 10})
    task = tasks.Task(tasks.TASKS["digits"].load, "vit_micro_patch4_32", 32, 64, 40, 50, 2)
    monkeypatch.setattr(accuracy, "TASKS", {"small": task})
    monkeypatch.setattr(accuracy, "METHODS", METHODS)
    monkeypatch.setattr(accuracy, "folder", lambda name: place)
    monkeypatch.setattr(accuracy, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(accuracy, "CACHE", tmp_path / "cache" / "pretrained")
    monkeypatch.setattr(accuracy, "_in_a_process", accuracy.perform)
    return tmp_path


def test_runs_are_chosen_on_validation_and_scored_once_on_test(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accuracy.everything(["small"], list(METHODS), seeds=2, workers=1)

    results = {path.stem: json.loads(path.read_text()) for path in (small / "results" / "small").glob("*.json")}
    for method in METHODS:
        best = accuracy.chosen("small", method)
        tried = [results[f"{method}-{rate:g}-0"] for rate in accuracy.rates(method)]
        assert max(max(run["val/acc1"]) for run in tried) == max(results[f"{method}-{best:g}-0"]["val/acc1"])
        scored = {name for name, run in results.items() if name.startswith(method) and "test/acc1" in run}
        assert scored == {f"{method}-{best:g}-0", f"{method}-{best:g}-1"}
        assert results[f"{method}-{best:g}-0"]["bytes"]["peak"] > 0
    assert len(results) == 2 * (3 + 1)
    assert not list((small / "cache").rglob("*.pt"))

    found = accuracy_table.collect(small / "results", ["small"], list(METHODS), seeds=2)
    assert all(len(rows["small"]["test/acc1"]) == 2 for rows in found.values())
    unfinished = accuracy_table.collect(small / "results", ["small"], list(METHODS), seeds=3)
    assert list(unfinished.values()) == [{}, {}]

    capsys.readouterr()
    accuracy.everything(["small"], list(METHODS), seeds=2, workers=1)
    assert capsys.readouterr().out == ""  # Nothing is done twice.


def test_the_epoch_that_was_best_on_validation_is_what_is_tested(small: Path) -> None:
    run = Run("small", "linear", 1e-2, 0)
    accuracy.perform(run, test=False)
    trained = torch.load(run.state, weights_only=True)

    accuracy.perform(run, test=True)
    kept = run.result()
    run.state.unlink()
    accuracy.perform(run, test=True)  # Trained again, to the same end.

    assert set(trained) == {"head.weight", "head.bias"}
    assert kept is not None
    assert kept["test/acc1"] == run.result()["test/acc1"]
    assert kept["test_images"] == 50


def test_a_seed_draws_images_that_do_not_overlap() -> None:
    task = tasks.TASKS["digits"]
    first, again, second = (tasks.splits(task, seed, (0.5,) * 3, (0.5,) * 3) for seed in (0, 0, 1))

    assert torch.equal(first["train"].images, again["train"].images)
    assert not torch.equal(first["train"].images, second["train"].images)
    assert [len(first[name].labels) for name in ("train", "val", "test")] == [task.train, task.val, task.test]
    assert all(split.images.shape[1:] == (3, task.image_size, task.image_size) for split in first.values())


def test_means_errors_and_the_first_line() -> None:
    def rows(*by_task: list[float]) -> dict[str, dict[str, object]]:
        return {
            f"task{number}": {"rate": 1e-3, "test/acc1": dict(enumerate(values)), "peak": 2**20, "trained": 1}
            for number, values in enumerate(by_task)
        }

    names = ["task0", "task1"]
    found = {"ours": rows([0.8, 0.9], [0.5, 0.7]), "theirs": rows([0.7, 0.9], [0.5, 0.6]), "full": rows([0.5], [0.5])}

    # Standard deviations 0.0707 and 0.1414 over sqrt(2), then over the root of two tasks' squares.
    assert accuracy_table.over_tasks(found["ours"], names) == pytest.approx((0.725, math.hypot(0.05, 0.1) / 2))
    # Differences by seed: 0.1, 0 and 0, 0.1.
    gain = accuracy_table.difference(found["ours"], found["theirs"], names)
    assert gain == pytest.approx((0.05, math.hypot(0.05, 0.05) / 2))
    text = accuracy_table.markdown(found, names, "ours", "theirs")
    assert text.startswith(
        "ours is above theirs on the mean over 2 tasks (+5.0 points, standard error 3.5), at 1.00 of"
    )
    assert "is above" not in accuracy_table.markdown(found, names, "ours", "another")
    del found["ours"]["task1"]
    assert "is above" not in accuracy_table.markdown(found, names, "ours", "theirs")
