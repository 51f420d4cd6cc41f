"""The GPU's benchmark runs on the CPU with a small model, so that it will run where there is a GPU."""

import json
from pathlib import Path

import torch

from benchmarks import gpu


def test_every_part_runs_and_is_written(tmp_path: Path, capsys: object) -> None:
    torch._dynamo.reset()
    out = tmp_path / "gpu.json"

    gpu.main(
        [
            "--device", "cpu", "--backbone", "test_vit", "--methods", "full,snell", "--precisions", "bf16-mixed",
            "--batches", "2", "--modes", "eager", "--rank", "4", "--rounds", "1", "--out", str(out),
        ]
    )  # fmt: skip

    found = json.loads(out.read_text())
    assert max(row["error"] for row in found["parity"]) < 1e-4
    assert found["model_error"] == 0
    assert not found["programs"]
    assert [row["method"] for row in found["steps"]] == ["full", "snell"]
    assert all(row["seconds"] > 0 for row in found["steps"])
    assert all(row["planned"] > 0 and row["measured"] is None for row in found["peaks"])


def test_what_fails_is_written_down_as_such() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such mode here")

    original, gpu.timed_step = gpu.timed_step, fail
    try:
        rows = gpu.step_times(
            gpu.Backbone("test_vit"), "snell", gpu.Settings(rank=4), 2, ["eager"], 1, torch.device("cpu")
        )
    finally:
        gpu.timed_step = original

    assert rows[0]["failed"] == "RuntimeError: no such mode here"
