"""The scripts that interrupt runs, and that train again and again, with fewer of each."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.interruptions import differences

ROOT = Path(__file__).parent.parent.parent


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", *arguments, "--dry"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nothing_is_lost_where_a_run_is_killed() -> None:
    printed = run("benchmarks.interruptions", "--parts", "kills", "--kills", "1", "--steps", "20")
    assert "kills 1: step" in printed
    assert "'exact': 1, 'end_differs_in': []" in printed
    assert "'logged_otherwise': []" in printed


def test_a_process_that_trains_again_has_no_more_threads_handles_or_files() -> None:
    lines = run("benchmarks.soak", "--fits", "3").splitlines()
    for name in ("threads", "children", "handles", "temporary"):
        (line,) = [line for line in lines if name in line]
        assert "+0.0000" in line


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({"a": torch.zeros(2), "b": [1, "x"]}, []),
        ({"a": torch.zeros(2), "b": [1, "y"]}, [".b[1] (x, y)"]),
        ({"a": torch.tensor([0.0, 1e-30]), "b": [1, "x"]}, [".a"]),
        ({"a": torch.zeros(2)}, None),
    ],
)
def test_every_difference_between_two_checkpoints_is_found(other: dict, found: list[str] | None) -> None:
    got = list(differences({"a": torch.zeros(2), "b": [1, "x"]}, other))
    assert got == found if found is not None else len(got) == 1
