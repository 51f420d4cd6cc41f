"""What every test shares: the same random numbers in each run, and the product precision restored."""

from collections.abc import Iterator

from snell_lightning.waiting import spin_briefly

# Here, before torch is loaded, and in every process that a test starts.
spin_briefly()

# Imported first, as on the command line: Python keeps one object for `int | float` and `float | int`, that of the
# module that wrote it first, and it decides whether a 4 in a config is parsed as 4 or as 4.0.
import lightning.pytorch  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402

# On models this small, threads cost more than they give.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
