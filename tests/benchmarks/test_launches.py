"""Launches and bytes on the accelerator's path, which no accelerator is needed for."""

import json
from pathlib import Path

import pytest

from benchmarks import launches
from benchmarks.methods import Settings

pytest.importorskip("triton", reason="triton is not installed")
USUAL = Settings(precision="bf16-mixed", rank=32, sparsity=0.9)


def test_a_layer_is_written_and_taken_apart_in_a_few_launches() -> None:
    counted = launches.one_layer(True, USUAL, (3072, 768))

    # The six of the thresholds, which a whole model shares, the matrix, its gradients and their sum.
    assert [counted.launches[name] for name in ("thresholds", "write_all", "backward_all")] == [6, 1, 2]
    assert counted.total["bytes"] < 80e6


def test_a_step_adds_few_launches_and_the_table_is_written(tmp_path: Path) -> None:
    out = tmp_path / "launches.json"

    launches.main(["--backbone", "test_vit", "--methods", "plain,snell", "--batch", "2", "--out", str(out)])

    plain, torchs, ours = json.loads(out.read_text())["steps"]
    layers = 24
    assert plain["added"] == 0
    assert ours["added"] <= 9 * layers
    assert torchs["added"] > 5 * ours["added"]
    assert ours["operations"]["write_all"] == layers
    assert ours["operations"]["backward_all"] == 2 * layers
    assert ours["operations"]["thresholds"] == 6


def test_the_committed_table_keeps_what_is_promised() -> None:
    found = json.loads(launches.RESULT.read_text())

    ours = next(row for row in found["steps"] if row["method"] == "snell")
    assert found["settings"]["backbone"] == "vit_base_patch16_224"
    assert ours["added"] <= 500
    (layer,) = [row for row in found["layers"] if row["shape"] == [3072, 768] and row["engine"] == "programs"]
    assert layer["bytes"] <= 80e6
