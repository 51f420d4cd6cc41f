"""Does it tune better? Tasks x methods x seeds on really pretrained backbones, beside the memory each method needs.

    pip install -e '.[bench]'
    python -m benchmarks.accuracy                     everything; goes on where it was stopped
    python -m benchmarks.accuracy --tasks photos --methods lora-8,snell-8-0.9
    python -m benchmarks.accuracy --quick             ten minutes: one task, four methods
    python -m benchmarks.accuracy --table             the table and the picture from the runs that are there

**Protocol.** Tasks are those of `benchmarks.tasks`, the loop is that of `benchmarks.training`. Every method has three
learning rates; they are tried with seed 0 and the best is the one with the highest validation accuracy of an epoch,
then the lowest validation loss. It is run with the other seeds, each of which draws images, order and initial values
anew. The test images are scored once a seed, with the weights of the epoch that was best on validation, and only for
the rate that was chosen.

**Memory** is the peak of a training step's live storages at batch 16, as `benchmarks.step` counts it.

Writes a JSON file a run to `benchmarks/results/accuracy/TASK/`, then `table.md`, `table.json` and `picture.png` beside
these folders. Each run is a process of its own with a single thread, and --workers of them go at once.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy_table import collect, markdown, picture
from benchmarks.common import RESULTS, environment, in_a_process, write_result
from benchmarks.methods import Backbone, Settings, Subject, make_model, parse_variants
from benchmarks.pretrained import CACHE, folder
from benchmarks.step import counted_step
from benchmarks.tasks import TASKS, splits
from benchmarks.training import BATCH, restore, score, train

FOLDER = RESULTS / "accuracy"
# Learning rates by method; what they belong to is the part of a variant's label before the first colon.
RATES = {
    "full": (3e-5, 1e-4, 3e-4),
    "linear": (3e-3, 1e-2, 3e-2),
    "lora": (1e-3, 3e-3, 1e-2),
    "dora": (1e-3, 3e-3, 1e-2),
    "snell": (1e-3, 3e-3, 1e-2),
}
METHODS = {
    "full": "full",
    "linear": "linear",
    "lora-8": "lora:rank=8",
    "dora-8": "dora:rank=8",
    **{
        f"snell-{rank}-{sparsity}": f"snell:rank={rank}:sparsity={sparsity}"
        for rank in (8, 32)
        for sparsity in (0, 0.5, 0.9, 0.99)
    },
}
# The two that the table's first line compares.
OURS, THEIRS = "snell-8-0.9", "lora-8"
QUICK = {"tasks": "photos", "methods": "linear,lora-8,snell-8-0.9"}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        task: One of `TASKS`.
        method: One of `METHODS`.
        rate: Learning rate.
        seed: Of images, order and initial values.
    """

    task: str
    method: str
    rate: float
    seed: int

    @property
    def path(self) -> Path:
        """Where its result goes."""
        return FOLDER / self.task / f"{self.method}-{self.rate:g}-{self.seed}.json"

    @property
    def state(self) -> Path:
        """Where what it trained is kept until the test images are scored."""
        return CACHE.parent / "accuracy" / self.task / f"{self.method}-{self.rate:g}-{self.seed}.pt"

    def result(self) -> dict[str, Any] | None:
        """Its result; None where it has not run."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else None

    @property
    def rank(self) -> tuple[float, float]:
        """Larger for the better of two rates, by validation alone."""
        found = self.result()
        assert found is not None
        best = found["selected_epoch"] - 1
        return found["val/acc1"][best], -found["val/loss"][best]


def rates(method: str) -> tuple[float, ...]:
    """The learning rates that a method is tried with."""
    return RATES[METHODS[method].partition(":")[0]]


def chosen(task: str, method: str) -> float | None:
    """The best rate of seed 0; None while one of them has not run."""
    tried = [Run(task, method, rate, 0) for rate in rates(method)]
    return max(tried, key=lambda run: run.rank).rate if all(run.result() for run in tried) else None


def perform(run: Run, test: bool) -> None:
    """Train, or take what was trained before, score the test images if they are wanted, and write the result."""
    task = TASKS[run.task]
    place = folder(task.backbone)
    described = json.loads((place / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    data = splits(task, run.seed, tuple(described["mean"]), tuple(described["std"]))
    classes = int(data["train"].labels.max()) + 1
    backbone = Backbone(f"local-dir:{place}", classes, task.image_size, seed=run.seed, pretrained=True)
    (variant,) = parse_variants(METHODS[run.method], Settings())
    device = torch.device("cpu")
    model = make_model(variant, backbone, device)
    result = run.result()
    if result is not None and run.state.is_file():
        restore(model, torch.load(run.state, weights_only=True))
    else:
        outcome = train(model, data, run.rate, task.epochs, run.seed)
        result = {
            "task": run.task, "method": METHODS[run.method], "settings": variant.read_settings(), "rate": run.rate,
            "seed": run.seed, "steps": outcome.steps,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "val/acc1": [round(value, 4) for value in outcome.accuracy],
            "val/loss": [round(value, 4) for value in outcome.loss],
            "selected_epoch": outcome.selected + 1, "environment": environment(device),
        }  # fmt: skip
        restore(model, outcome.best)
        if not test:
            run.state.parent.mkdir(parents=True, exist_ok=True)
            torch.save(outcome.best, run.state)
    if test:
        result["test/acc1"] = round(score(model, data["test"])[0], 4)
        result["test_images"] = len(data["test"].labels)
        if run.seed == 0:
            result["bytes"] = _bytes(model, data["train"].images[:BATCH], data["train"].labels[:BATCH])
    write_result(run.path, result)


def _bytes(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, int]:
    """Bytes of a steady step."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    subject = Subject(model, optimizer, "fp32", images, labels)
    subject.step()
    counted = counted_step(subject)
    return {name: counted[name] for name in ("weights", "gradients", "optimizer", "kept", "peak")}


def _in_a_process(run: Run, test: bool) -> None:
    """Perform a run in a process of its own with one thread."""
    chosen = ("--run", run.task, run.method, repr(run.rate), str(run.seed))
    in_a_process("benchmarks.accuracy", *chosen, *(["--test"] if test else []))


def in_processes(runs: Sequence[Run], test: bool, workers: int) -> None:
    """Do what is not done yet, each run in a process of its own with one thread."""

    def missing(run: Run) -> bool:
        found = run.result()
        return found is None or (test and "test/acc1" not in found)

    def start(run: Run) -> None:
        _in_a_process(run, test)
        found = run.result()
        assert found is not None
        scored = f"test {found['test/acc1']:.4f}" if test else f"val {max(found['val/acc1']):.4f}"
        print(f"{run.task:8} {run.method:14} rate {run.rate:<7g} seed {run.seed}  {scored}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(start, filter(missing, runs)))


def everything(tasks: Sequence[str], methods: Sequence[str], seeds: int, workers: int) -> None:
    """All runs of these tasks and methods: of each task first the rates, then the chosen ones with every seed."""
    for task in tasks:
        in_processes([Run(task, method, rate, 0) for method in methods for rate in rates(method)], False, workers)
        best = {method: chosen(task, method) for method in methods}
        again = [Run(task, method, rate, seed) for method, rate in best.items() if rate for seed in range(seeds)]
        in_processes(again, True, workers)
        for method in methods:
            for rate in rates(method):
                Run(task, method, rate, 0).state.unlink(missing_ok=True)


def report(tasks: Sequence[str], methods: Sequence[str], seeds: int) -> None:
    """Print the table of these tasks and methods; where it is of all of them, write it, and the picture."""
    found = collect(FOLDER, tasks, methods, seeds)
    text = markdown(found, tasks, OURS, THEIRS)
    print(text)
    if list(tasks) == list(TASKS) and list(methods) == list(METHODS):
        (FOLDER / "table.md").write_text(text, encoding="utf-8")
        write_result(FOLDER / "table.json", found)
        picture(found, tasks, FOLDER / "picture.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes at once, each with one thread")
    parser.add_argument("--quick", action="store_true", help=f"only {QUICK['methods']} on {QUICK['tasks']}")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--run", nargs=4, metavar=("TASK", "METHOD", "RATE", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--test", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.run:
        torch.set_num_threads(1)
        task, method, rate, seed = arguments.run
        perform(Run(task, method, float(rate), int(seed)), arguments.test)
        return
    wanted = {"tasks": arguments.tasks, "methods": arguments.methods} | (QUICK if arguments.quick else {})
    names = {kind: text.split(",") for kind, text in wanted.items()}
    for kind, known in (("tasks", TASKS), ("methods", METHODS)):
        if unknown := set(names[kind]) - set(known):
            parser.error(f"there is no {', '.join(sorted(unknown))} among the {kind}: {', '.join(known)}")
    if not arguments.table:
        everything(names["tasks"], names["methods"], arguments.seeds, arguments.workers)
    report(names["tasks"], names["methods"], arguments.seeds)


if __name__ == "__main__":
    main()
