"""What rounding at random does to a layer's output, and the runs that were made with it."""

import json

import pytest

from benchmarks import rounding


def test_noise_is_what_is_derived_and_vanishes_on_average() -> None:
    found = rounding.of_a_layer(1e-3)

    # A mean square of u^2 / 6 beside u^2 / 12.
    assert found["random"] == pytest.approx(2**0.5 * found["apart"], rel=0.02)
    assert found["random, mean of 32"] == pytest.approx(found["random"] / 32**0.5, rel=0.1)


def test_both_jobs_were_run_with_five_seeds() -> None:
    runs = json.loads(rounding.RESULT.read_text())["runs"]

    assert len(runs) == 20
    for job in ("embedded", "digits"):
        for kind in rounding.ROUNDING:
            assert sum(name.startswith(f"{job} {kind} ") for name in runs) == 5
