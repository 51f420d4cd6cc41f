"""Every program for a GPU is compiled for one, and what `ptxas` says of it is read; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_no_program_spills_registers(tmp_path: Path, capability: str) -> None:
    out = tmp_path / "programs.json"
    # Triton's interpreter, which other tests use, compiles nothing.
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.programs", "--capabilities", capability, "--out", str(out)]

    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    programs = json.loads(out.read_text())["programs"]
    assert {each["program"] for each in programs} == {"count", "choose", "write", "backward", "reduce", "dropped"}
    for each in programs:
        assert each["spilled"] == 0, each
        # What a multiprocessor has for a block of so many warps, so that at least one fits.
        assert 0 < each["registers"] * each["warps"] * 32 <= 65536
        assert each["shared"] <= 48 * 1024
