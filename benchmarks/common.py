"""What the scripts here share: where a number was measured, how it is timed in turns, and how results are written."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# How OpenMP's threads wait for work.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
PACKAGES = ("torch", "timm", "peft", "matplotlib")

T = TypeVar("T")


def pick_device(name: str | None) -> torch.device:
    """The named device, or the accelerator if there is one, or the CPU."""
    if name is not None:
        return torch.device(name)
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        if found is not None:
            return found
    return torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was asked to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of a call, with the device's work done at both ends."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(jobs: Mapping[str, Callable[[], T]], rounds: int, warmup: int = 1) -> dict[str, list[T]]:
    """Run the jobs A B C A B C, so that a machine that slows down slows all of them.

    Args:
        jobs: Callables by name.
        rounds: How often each result is kept.
        warmup: Rounds before that, whose results are thrown away.
    """
    results: dict[str, list[T]] = {name: [] for name in jobs}
    for turn in range(warmup + rounds):
        for name, job in jobs.items():
            result = job()
            if turn >= warmup:
                results[name].append(result)
    return results


def in_a_process(module: str, *arguments: str) -> None:
    """Run a script in a process of its own with one thread, so that several of them do not get in each other's way.

    Raises:
        RuntimeError: It failed; with what it wrote on standard error.
    """
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr}")


def median(values: Sequence[float]) -> float:
    """The median, to six significant digits."""
    return float(f"{statistics.median(values):.6g}")


def ratio(value: float | None, reference: float | None) -> float | None:
    """A quotient to four decimals; `None` where there is nothing to compare."""
    return round(value / reference, 4) if value is not None and reference else None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, threads, and the commit. Results of earlier runs do not count as changes to the tree."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": {"type": device.type, "name": _device_name(device)},
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "threads_wait": {name: value for name, value in os.environ.items() if name in _WAITING} or "OpenMP's default",
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")),
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write one run as JSON, numbers in a row; a file of that name is replaced once the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(_json(result) + "\n", encoding="utf-8")
    unfinished.replace(path)


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], console: Console | None = None
) -> None:
    """A table on standard output: the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    # A file or a pipe gets the whole width.
    (console or Console(width=None if os.isatty(1) else 180)).print(table)


def mebibytes(count: int | None) -> str | None:
    """Bytes as MiB with one decimal."""
    return None if count is None else f"{count / 2**20:,.1f}"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _json(value: Any, indent: int = 0) -> str:
    """JSON with one key a line and lists of numbers on one line."""
    if isinstance(value, Mapping) and value:
        inner = " " * (indent + 2)
        rows = [f"{inner}{json.dumps(str(key))}: {_json(item, indent + 2)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"
    if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        inner = " " * (indent + 2)
        return "[\n" + ",\n".join(inner + _json(item, indent + 2) for item in value) + "\n" + " " * indent + "]"
    return json.dumps(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return _cpu_model()
    named = getattr(torch.get_device_module(device), "get_device_name", None)
    return str(named(device)) if named else device.type


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
