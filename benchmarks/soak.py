"""Does a process that trains again and again grow?

    python -m benchmarks.soak                300 short fits in one process, about ten minutes
    python -m benchmarks.soak --fits 30

Each fit is a whole command: parsing, data with a worker process, the backbone, some steps, validation, checkpoints,
the adapter, TensorBoard's file, the tables of the classes. After each, with its folder removed, these are counted:

| what | how |
|---|---|
| `memory_mib` | the process's resident set, after garbage collection and the C library's giving back what it can |
| `objects` | that Python's garbage collector knows |
| `threads`, `children`, `handles` | of the process: open files, sockets and pipes |
| `temporary` | files in the temporary folder, which is the process's own |
| `shared` | new files in shared memory, whoever has made them |

Reported are the first and the last value and the slope per fit, by least squares over the second half: what is loaded
or compiled once has been by then. Writes `benchmarks/results/soak.json`.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, environment, write_result
from snell_lightning.cli import main as command

JOB = (
    "fit", "--config", "vit.yaml", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1",
    "--data.batch_size", "4",
    "--data.eval_batch_size", "16", "--data.num_workers", "1", "--trainer.limit_train_batches", "4",
    "--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1", "--checkpoint.every_n_train_steps", "2",
    "--model.adapter.rank", "2", "--model.mixup", "0.2", "--trainer.enable_progress_bar", "false",
)  # fmt: skip
# Where Linux keeps memory that processes share.
_SHARED = "/dev/shm"


def fit() -> None:
    """Train once, in a folder that is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            command([*JOB, "--trainer.default_root_dir", str(folder)])
    finally:
        shutil.rmtree(folder)


def names(folder: str) -> set[str]:
    """What is in a folder, if there is such a one."""
    return set(os.listdir(folder)) if Path(folder).is_dir() else set()


def counts(shared_before: set[str]) -> dict[str, float]:
    """What the process holds now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    process = psutil.Process()
    return {
        "memory_mib": process.memory_info().rss / 2**20,
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
        "children": len(process.children(recursive=True)),
        "handles": process.num_fds() if os.name == "posix" else process.num_handles(),
        "temporary": len(names(tempfile.gettempdir())),
        "shared": len(names(_SHARED) - shared_before),
    }


def main() -> None:
    """Fit again and again, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=int, default=300)
    parser.add_argument("--dry", action="store_true", help="write no result")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sys.argv = sys.argv[:1]
    shared, began = names(_SHARED), time.perf_counter()
    taken = []
    with tempfile.TemporaryDirectory() as own:
        os.environ["TMPDIR"] = tempfile.tempdir = own
        for number in range(given.fits):
            fit()
            taken.append(counts(shared))
            if (number + 1) % 20 == 0:
                print(number + 1, {name: round(value, 1) for name, value in taken[-1].items()}, flush=True)
    table = Table("", "first", "last", "slope per fit")
    half, result = len(taken) // 2, {}
    for name in taken[0]:
        values = np.array([each[name] for each in taken])
        # Not -0.0 either.
        slope = round(float(np.polyfit(np.arange(len(values) - half), values[half:], 1)[0]), 4) + 0.0
        result[name] = {"first": values[0], "halfway": values[half], "last": values[-1], "slope_per_fit": slope}
        table.add_row(name, f"{values[0]:,.1f}", f"{values[-1]:,.1f}", f"{slope:+.4f}")
    Console().print(table)
    if not given.dry:
        rounded = {name: {key: round(float(value), 4) for key, value in each.items()} for name, each in result.items()}
        seconds = round(time.perf_counter() - began, 1)
        found = {"fits": given.fits, "seconds": seconds, **rounded, "environment": environment(torch.device("cpu"))}
        write_result(RESULTS / "soak.json", found)


if __name__ == "__main__":
    main()
