"""Growth: the fit, and a whole run on tiny sizes."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import growth

TINY = [
    "--widths", "8", "16", "32", "--ranks", "2", "4", "--tokens", "4", "8", "--batches", "1", "2",
    "--sparsities", "0.5", "0.9", "--base-width", "16", "--base-rank", "4", "--base-tokens", "8",
    "--backbone", "test_vit", "--image-size", "32", "--large", "24", "40", "--large-tokens", "4",
    "--large-steps", "20", "--rounds", "1", "--device", "cpu",
]  # fmt: skip


def test_the_fit_recovers_a_known_power_law() -> None:
    x = [1.0, 2.0, 8.0, 64.0]

    exponent, factor = growth.power_law(x, [3.0 * value**1.75 for value in x])

    assert exponent == pytest.approx(1.75)
    assert factor == pytest.approx(3.0)


def test_peak_bytes_leave_out_what_lives_already() -> None:
    x = torch.randn(256)

    # The sum of two temporaries of 1 KiB lives beside one of them at most: 2 KiB, and x is not among them.
    assert growth.peak_bytes(lambda: (x + 1).mul(2).sub_(1), x) == 2 * 256 * 4


def test_a_run_writes_every_sweep_and_the_large_layer_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(growth, "draw", lambda path, what, sweeps, note: drawn.append(path.name))

    growth.run([*TINY, "--output", str(tmp_path)])

    result = json.loads((tmp_path / "growth.json").read_text())
    assert list(result["sweeps"]) == ["width", "rank", "tokens", "surviving fraction", "batch"]
    for found in result["sweeps"].values():
        assert len(found["points"]) == len(found["median_seconds"]) == len(found["peak_bytes"])
        assert {"time_exponent", "bytes_exponent"} <= found.keys()
        assert min(found["peak_bytes"]) > 0
    assert result["large"]["entries"] == 24 * 40
    assert result["large"]["loss"][-1] < 0.99 * result["large"]["loss"][0]
    assert drawn == ["growth-time.svg", "growth-bytes.svg"]


def test_a_figure_is_the_same_file_each_time_and_names_its_exponents(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra bench")
    points = [1, 2, 4]
    found = {"points": points, "median_seconds": [x**1.5 for x in points], "peak_bytes": [2**20 * x for x in points]}
    sweeps = dict.fromkeys(("width", "rank", "tokens"), found)

    for name in ("first.svg", "second.svg"):
        growth.draw(tmp_path / name, "time", sweeps, "a note")

    first = (tmp_path / "first.svg").read_text()
    assert first == (tmp_path / "second.svg").read_text()
    assert first.count("exponent 1.50") >= 3
    assert "a note" in first
    assert "date" not in first.lower()
