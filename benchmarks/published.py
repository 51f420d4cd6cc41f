"""Run a whole published benchmark, VTAB-1k or FGVC, and put the scores beside the published ones.

    python -m benchmarks.published vtab --root vtab-1k --output runs/vtab
    python -m benchmarks.published fgvc --root sets --output runs/fgvc --group snell8 --protocol published
    python -m benchmarks.published vtab --root vtab-1k --output runs/vtab --only cifar -- --trainer.precision bf16-mixed

Each task is one run of its config in `configs/paper/`, in a folder of its own below the output. What is done is not
done again, and a run that was stopped goes on: the same command once more, or the same with `--only TASK` on another
machine that shares the folder, goes on with what is left. Options behind `--` go to every `fit`. Writes `TASK.json` for
each task and `table.md` from all there are.

By default the epoch is chosen on validation images and the test images are looked at once. The papers' scores are the
best test score over epochs, after training on the validation images too: `--protocol published` does that.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import recipes
from snell_lightning.adapters import UserError, read_adapter
from snell_lightning.adapters.whole import whole
from snell_lightning.data.lists import VTAB

# Columns of the published tables and the tasks in their mean, in order.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "fgvc": {
        "CUB": ("cub",),
        "NABirds": ("nabirds",),
        "Flowers": ("oxfordflower",),
        "Dogs": ("stanforddog",),
        "Cars": ("stanfordcar",),
    },
    "vtab": {
        "Natural": tuple(list(VTAB)[:7]),
        "Specialized": tuple(list(VTAB)[7:11]),
        "Structured": tuple(list(VTAB)[11:]),
    },
}
# Facts of the paper, in per cent: the columns above, and what follows them.
PUBLISHED: dict[tuple[str, str], tuple[float | None, ...]] = {
    ("fgvc", "snell8"): (89.6, 86.8, 99.3, 92.1, 89.9, 91.5),
    ("fgvc", "snell16"): (89.9, 87.0, 99.3, 92.2, 90.3, 91.7),
    ("fgvc", "snell32"): (89.9, 87.0, 99.4, 92.0, 90.5, 91.8),
    ("fgvc", "snella32"): (None, None, None, None, None, 91.9),
    ("vtab", "snell32"): (82.7, 86.1, 61.8, 76.9, 74.6),
}
SAID = {
    "validation": "the epoch chosen on validation images, the test images looked at once",
    "published": "the best score on test images over epochs, as published",
}


def tasks_of(benchmark: str, group: str) -> dict[str, str]:
    """The configs of a benchmark's tasks, in the order of the tables."""
    known = {row["dataset"]: recipes.config_name(row) for row in recipes.rows() if _is_of(row, benchmark, group)}
    return {task: known[task] for tasks in GROUPS[benchmark].values() for task in tasks}


def _is_of(row: Mapping[str, str], benchmark: str, group: str) -> bool:
    return (row["benchmark"], row["group"]) == (benchmark, group)


def folder_of(root: Path, task: str) -> Path:
    """A task's folder below the root.

    Raises:
        UserError: It is not there.
    """
    for name in (task, recipes.FOLDERS.get(task, task)):
        if (root / name).is_dir():
            return root / name
    alike = [path for path in sorted(root.iterdir()) if path.is_dir() and _letters(path.name).startswith(task)]
    if len(alike) != 1:
        raise UserError(f"{root} has no folder {task} or {recipes.FOLDERS.get(task, task)}; --only names those to run")
    return alike[0]


def _letters(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalpha())


def run_task(config: str, images: Path, protocol: str, output: Path, options: Sequence[str]) -> dict[str, Any]:
    """One task, from where it was left.

    Args:
        config: Name of its config.
        images: Its folder.
        protocol: `validation` or `published`.
        output: Where its runs go; what is done is noted beside it.
        options: For `fit`.

    Returns:
        Its `score` in [0, 1], `epoch` and `protocol`.
    """
    result, fitted = output.with_suffix(".json"), output / "fitted.json"
    if result.is_file():
        done = json.loads(result.read_text())
        if done["protocol"] != protocol:
            raise UserError(f"{result} is of protocol {done['protocol']}, not {protocol}; name another output")
        return done
    where = ["--trainer.default_root_dir", str(output)]
    if not fitted.is_file():
        chosen = ["--data.root", str(images), "--data.protocol", protocol, *where]
        _snell("fit", "--config", config, *chosen, "--resume", "auto", *options)
        _write(fitted, {"run": str(_newest(output, "version_*"))})
    run = Path(json.loads(fitted.read_text())["run"])
    metadata = read_adapter(run / "adapter.safetensors")[1]
    if protocol == "published":
        score = metadata["test_by_epoch/acc1"]
    else:
        _snell("test", "--config", str(run / "config.yaml"), *where)
        score = _tested(_newest(output, "test_*") / "metrics.csv")
    done = {"score": score, "epoch": metadata["epoch"], "protocol": protocol, "run": str(run)}
    _write(result, done)
    return done


def _snell(*arguments: str) -> None:
    """Run a command of the package; if it fails, so does this."""
    code = subprocess.run([sys.executable, "-m", "snell_lightning", *arguments], check=False).returncode
    if code:
        raise SystemExit(code)


def _newest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def _tested(metrics: Path) -> float:
    with metrics.open(newline="") as file:
        return next(float(row["test/acc1"]) for row in csv.DictReader(file) if row.get("test/acc1"))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with whole(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def table(benchmark: str, group: str, protocol: str, scores: Mapping[str, float]) -> str:
    """Scores beside the published ones, in the layout of the papers' tables.

    Args:
        benchmark: `vtab` or `fgvc`.
        group: Such as `snell32`.
        protocol: What the scores are of.
        scores: By task, in [0, 1]; a mean stands where all of its tasks are there.
    """
    columns = GROUPS[benchmark]
    cells = [_mean([scores.get(task) for task in tasks]) for tasks in columns.values()]
    means = [_mean(cells)]
    names = [*columns, "FGVC mean"]
    if benchmark == "vtab":
        names[-1:] = ["VTAB groups", "VTAB 19"]
        means.append(_mean([scores.get(task) for tasks in columns.values() for task in tasks]))
    title = f"{group.rstrip('0123456789').upper()}-{group.lstrip('snela')}"
    count = sum(map(len, columns.values()))
    rows = [
        ["method", *names],
        ["---"] * (len(names) + 1),
        [f"{title}, published", *("" if value is None else f"{value:.1f}" for value in PUBLISHED[benchmark, group])],
        [f"{title}, here", *("" if value is None else f"{100 * value:.1f}" for value in [*cells, *means])],
    ]
    each = [["task", "here"], ["---", "---"], *([task, f"{100 * score:.1f}"] for task, score in scores.items())]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    details = [f"| {' | '.join(row)} |" for row in each]
    said = f"Top-1 accuracy in per cent; here {SAID[protocol]}, of {len(scores)} of {count} tasks."
    published = f"Published: {SAID['published']}."
    return "\n".join([said, published, "", *lines, "", *details, ""])


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.mean(present) if present and len(present) == len(values) else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is left, and write the table after each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=GROUPS)
    parser.add_argument("--root", type=Path, required=True, help="the folder with the tasks' folders")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--group", default="snell32", choices=sorted({group for _, group in PUBLISHED}))
    parser.add_argument("--protocol", default="validation", choices=SAID)
    parser.add_argument("--only", nargs="+", metavar="TASK")
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    chosen, options = parser.parse_args(given[:cut]), given[cut + 1 :]
    if (chosen.benchmark, chosen.group) not in PUBLISHED:
        parser.error(f"{chosen.group} was not published on {chosen.benchmark}")
    tasks = tasks_of(chosen.benchmark, chosen.group)
    if unknown := sorted(set(chosen.only or ()) - tasks.keys()):
        parser.error(f"{chosen.benchmark} has no {', '.join(unknown)}; its tasks are {', '.join(tasks)}")
    if not chosen.root.is_dir():
        parser.error(f"there is no folder {chosen.root}")
    try:
        folders = {task: folder_of(chosen.root, task) for task in chosen.only or tasks}
        for task, images in folders.items():
            print(f"{task}: {images}", flush=True)
            run_task(tasks[task], images, chosen.protocol, chosen.output / task, options)
            found = {
                name: json.loads(path.read_text())["score"]
                for name in tasks
                if (path := chosen.output / f"{name}.json").is_file()
            }
            text = table(chosen.benchmark, chosen.group, chosen.protocol, found)
            with whole(chosen.output / "table.md") as part:
                part.write_text(text)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    print(text)


if __name__ == "__main__":
    main()
