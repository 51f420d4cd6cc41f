"""How OpenMP's threads wait is said before torch is loaded, and left to a user who has said it."""

import subprocess
import sys

import pytest

from snell_lightning.waiting import spin_briefly


def test_threads_spin_briefly_where_nothing_is_said() -> None:
    environment = {"HOME": "/"}
    spin_briefly(environment)
    assert environment == {"HOME": "/", "GOMP_SPINCOUNT": "20000"}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_says_holds(name: str) -> None:
    environment = {name: "x"}
    spin_briefly(environment)
    assert environment == {name: "x"}


def test_the_program_says_it_before_torch_is_imported() -> None:
    code = """
import os, runpy, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Watch())
sys.argv = ["snell_lightning", "fit"]
runpy.run_module("snell_lightning", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], env={}, capture_output=True, text=True, check=True)
    assert done.stdout == "20000\n"
