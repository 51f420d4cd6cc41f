"""What every test shares: the same random numbers in each run, and the product precision restored."""

import os
from collections.abc import Iterator

# Before torch is loaded, and for every process that a test starts: tests share the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
# Programs for a GPU are run by Triton's interpreter, which Triton decides on when it is loaded.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Imported first, as on the command line: Python keeps one object for `int | float` and `float | int`, that of the
# module that wrote it first, and it decides whether a 4 in a config is parsed as 4 or as 4.0.
import lightning.pytorch  # noqa: F401
import pytest
import torch

# On models this small, threads cost more than they give.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
