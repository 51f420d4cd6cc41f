"""The table and the picture of `benchmarks.accuracy`, from the files of its runs.

The error beside a mean over seeds is its standard error. That of a mean over tasks comes from the tasks' own, and that
of a difference between two methods from the differences seed by seed, whose images are the same.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MIB = 2**20


def collect(folder: Path, tasks: Sequence[str], methods: Sequence[str], seeds: int) -> dict[str, dict[str, Any]]:
    """What the runs say by method and task; a task that a method has not finished is left out there.

    Args:
        folder: With a folder for each task.
        tasks: Names.
        methods: Names.
        seeds: How many of them make a task finished.

    Returns:
        Of each method and task the rate, the test accuracies by seed, the trained parameters and the peak in bytes.
    """
    found: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for task in tasks:
        for path in sorted((folder / task).glob("*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            method = path.stem.removesuffix(f"-{result['rate']:g}-{result['seed']}")
            if "test/acc1" not in result or method not in found:
                continue
            row = found[method].setdefault(task, {"rate": result["rate"], "test/acc1": {}})
            row["test/acc1"][result["seed"]] = result["test/acc1"]
            if "bytes" in result:
                row["peak"], row["trained"] = result["bytes"]["peak"], result["trained_parameters"]
    return {
        method: {task: row for task, row in rows.items() if len(row["test/acc1"]) >= seeds and "peak" in row}
        for method, rows in found.items()
    }


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; not a number where there is one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def over_tasks(rows: Mapping[str, Any], tasks: Sequence[str]) -> tuple[float, float]:
    """Mean accuracy over these tasks, and its standard error."""
    means = [statistics.mean(rows[task]["test/acc1"].values()) for task in tasks]
    errors = [standard_error(list(rows[task]["test/acc1"].values())) for task in tasks]
    return statistics.mean(means), math.hypot(*errors) / len(tasks)


def difference(one: Mapping[str, Any], other: Mapping[str, Any], tasks: Sequence[str]) -> tuple[float, float]:
    """How much higher the first method's mean over tasks is, and the standard error of that."""
    means, errors = [], []
    for task in tasks:
        ours, theirs = one[task]["test/acc1"], other[task]["test/acc1"]
        pairs = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
        means.append(statistics.mean(pairs))
        errors.append(standard_error(pairs))
    return statistics.mean(means), math.hypot(*errors) / len(tasks)


def verdict(found: Mapping[str, Mapping[str, Any]], ours: str, theirs: str, tasks: Sequence[str]) -> str:
    """One sentence on the first method beside the second."""
    gain, error = difference(found[ours], found[theirs], tasks)
    peaks = [found[ours][task]["peak"] / found[theirs][task]["peak"] for task in tasks]
    level = "above" if gain > error else "level with" if gain >= -error else "below"
    return (
        f"{ours} is {level} {theirs} on the mean over {len(tasks)} tasks ({100 * gain:+.1f} points, standard error "
        f"{100 * error:.1f}), at {statistics.mean(peaks):.2f} of its peak memory."
    )


def markdown(found: Mapping[str, Mapping[str, Any]], tasks: Sequence[str], ours: str, theirs: str) -> str:
    """The table as text; methods that have not finished a task show nothing there, and no mean."""
    lines = []
    if all(task in found.get(method, {}) for method in (ours, theirs) for task in tasks):
        lines += [verdict(found, ours, theirs, tasks), ""]
    lines.append("Test accuracy in %: mean and standard error over seeds, the learning rate in brackets. Peaks in MiB.")
    header = ["method", *tasks, "mean", *(f"peak, {task}" for task in tasks)]
    lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for method, rows in found.items():
        cells = [_cell(rows.get(task)) for task in tasks]
        done = all(task in rows for task in tasks)
        mean, error = over_tasks(rows, tasks) if done else (math.nan, math.nan)
        peaks = [f"{rows[task]['peak'] / MIB:.0f}" if task in rows else "" for task in tasks]
        whole = f"{100 * mean:.1f} ± {100 * error:.1f}" if done else ""
        lines.append(f"| {method} | {' | '.join(cells)} | {whole} | {' | '.join(peaks)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    values = list(row["test/acc1"].values())
    return f"{100 * statistics.mean(values):.1f} ± {100 * standard_error(values):.1f} ({row['rate']:g})"


def picture(found: Mapping[str, Mapping[str, Any]], tasks: Sequence[str], path: Path) -> None:
    """Accuracy against peak memory, both as means over tasks, the memory in parts of full fine-tuning's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    named: list[tuple[float, float, str]] = []
    for method, rows in found.items():
        if not all(task in rows and task in found["full"] for task in tasks):
            continue
        memory = statistics.mean(rows[task]["peak"] / found["full"][task]["peak"] for task in tasks)
        mean, error = over_tasks(rows, tasks)
        kind = method.partition("-")[0]
        colour = {"snell": "tab:green", "lora": "tab:blue", "dora": "tab:purple"}.get(kind, "tab:gray")
        axes.errorbar(memory, 100 * mean, 100 * error, fmt="o", color=colour, capsize=3)
        named.append((memory, 100 * mean, method))
    beside: list[tuple[float, float, str]] = []
    for memory, mean, method in named:
        # Of points that lie close together the left ones have their names on the left, and equal ones above each other.
        near = [x for x, y, _ in named if abs(x - memory) < 0.1 and abs(y - mean) < 1.2]
        align = "right" if memory < statistics.mean(near) - 1e-3 else "left"
        equal = [x for x, y, side in beside if side == align and abs(x - memory) < 0.1 and abs(y - mean) < 0.6]
        beside.append((memory, mean, align))
        offset = (-6 if align == "right" else 6, 4 if not equal else -11)
        axes.annotate(
            method, (memory, mean), xytext=offset, textcoords="offset points", fontsize=8, horizontalalignment=align
        )
    axes.set_xlabel("peak memory of a training step, full fine-tuning = 1")
    axes.set_ylabel(f"test accuracy in %, mean over {', '.join(tasks)}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
