"""The learning-rate curves, in part."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import rates
from benchmarks.rates import RATES, Curve


def test_the_lowest_point_lies_between_the_rates() -> None:
    # A parabola in the logarithm of the rate, lowest at 4e-3.
    losses = [(math.log2(rate) - math.log2(4e-3)) ** 2 for rate in RATES]

    assert rates.lowest(RATES, losses) == pytest.approx(4e-3)


@pytest.mark.parametrize("best", [0, len(RATES) - 1])
def test_a_curve_that_is_lowest_at_its_end_says_so(best: int) -> None:
    assert rates.lowest(RATES, [abs(place - best) for place in range(len(RATES))]) == RATES[best]


def test_the_table_has_means_over_seeds_and_names_what_collapsed_and_how_far_the_best_rates_are_apart() -> None:
    steep = [2.0, 1.0, 0.5, 1.0, 3.0]  # Symmetric about the third rate where it counts; guessing has 2.30.
    curve = Curve("default", 144, 8, 0.5, 2)
    found = {
        curve: {"steps": 36, "val/loss": [loss - 0.2 for loss in steep], "beyond": {"val/loss": 1.5}},
        replace(curve, seed=1): {"steps": 36, "val/loss": [loss + 0.2 for loss in steep]},
        Curve("default", 384, 8, 0.5, 2): {"steps": 36, "val/loss": [1.0, 0.5, 1.0, 2.0, 2.0]},
        Curve("published", 384, 8, 0.5, 2): {"steps": 36, "val/loss": [2.0, 1.9, 1.0, 0.5, 0.4]},
    }

    text = rates.table(rates.over_seeds(found))

    assert text.count("collapsed") == 1
    assert (
        "| default | 144 | 8 | 0.5 | 36 | 2 | 3.0e-03 | 2.000 | 1.000 | 0.500 | 1.000 | 3.000 collapsed | 1.500 |"
        in text
    )
    assert "default: best rates from 1.5e-03 to 3.0e-03, all within a factor of 1.4 of 2.1e-03." in text
    assert "1.2e-02 or more" in text
    assert "1 of 1 are at the end of what was tried" in text


def test_a_curve_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "FOLDER", tmp_path)
    monkeypatch.setattr(rates, "RATES", (1e-3, 2e-3))
    curve = Curve("default", 144, 8, 0.9, 1)

    rates.measure(curve)

    result = json.loads(curve.path.read_text())
    assert (result["steps"], result["width"]) == (18, 144)
    assert all(0 < loss < math.log(10) for loss in result["val/loss"])
    assert result["beyond"]["rate"] == pytest.approx(3 * rates.RATES[result["val/loss"].index(min(result["val/loss"]))])
    assert 0 < result["beyond"]["val/loss"] < math.log(10)


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra bench")
    found = {Curve("default", 384, 8, 0.5, 2): {"steps": 36, "val/loss": [1.0, 0.5, 1.0, 2.0, 2.0]}}

    rates.picture(found, tmp_path / "picture.png")

    assert (tmp_path / "picture.png").stat().st_size > 1000
