"""What every test shares: the same random numbers in each run, and the product precision restored."""

from collections.abc import Iterator

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
