"""Is anything lost where a run is killed, stopped, or finds its checkpoints damaged?

    python -m benchmarks.interruptions                        all three parts, about a quarter of an hour on 2 cores
    python -m benchmarks.interruptions --parts kills --kills 3 --seed 7

A run goes to its end undisturbed, and each of its checkpoints is kept. Then the same run is

| part | what happens to it |
|---|---|
| `kills` | SIGKILL at random moments, while it starts, trains, validates or saves; each time `--resume auto` goes on |
| `stops` | two processes (DDP), SIGTERM to the first at random moments; each time `--resume auto` goes on |
| `damage` | its newest checkpoint is cut off, or a bit in it is flipped, at random places |

Everything that is drawn at random is on: order, augmentation in worker processes, Mixup and CutMix, dropout and drop
path of the update; two batches make a step, and validation comes in the middle of an epoch. After each kill and stop
the checkpoint that is left is compared with that of the undisturbed run at the same step, and at the end the last one
and all that was logged: every tensor of weights, gradients and optimizer, the counts of the loops, the states of the
random generators. Equal means every bit. Times and memory, which are logged too, are not compared.

Writes `benchmarks/results/interruptions.json`.
"""

import argparse
import csv
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.common import RESULTS, environment, write_result
from snell_lightning.adapters import UserError
from snell_lightning.arguments import continue_run
from snell_lightning.checkpoints import read_checkpoint

LAST = Path("runs/version_0/checkpoints/last.ckpt")
JOB = (
    "fit", "--config", "vit.yaml", "--trainer.accelerator", "cpu", "--data.batch_size", "8", "--data.num_workers", "1",
    "--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "30", "--trainer.limit_val_batches", "2",
    "--model.mixup", "0.2", "--model.cutmix", "1.0", "--model.adapter.rank", "2", "--model.adapter.dropout", "0.1",
    "--model.adapter.drop_path", "0.1", "--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false",
)  # fmt: skip
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
# What a checkpoint says of where and when rather than of what.
APART = ("callbacks", "hparams_name")
_TIMES = ("memory/", "throughput/")


class Keep(Callback):
    """Keep a copy of each `last.ckpt`, named by its step."""

    def __init__(self) -> None:
        self._kept = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copy what was saved since the last time."""
        if trainer.is_global_zero and LAST.is_file() and LAST.stat().st_mtime != self._kept:
            self._kept = LAST.stat().st_mtime
            shutil.copyfile(LAST, f"{read_checkpoint(LAST)['global_step']}.ckpt")


def start(folder: Path, *options: str) -> subprocess.Popen:
    """Start the job in a process group of its own."""
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    with (folder / "printed.txt").open("a") as printed:
        return subprocess.Popen(
            [sys.executable, "-m", "snell_lightning", *JOB, *options],
            cwd=folder,
            env={**os.environ, **quiet, "PYTHONPATH": path},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(folder: Path, *options: str) -> None:
    """Run the job to its end."""
    if start(folder, *options).wait(1200) != 0:
        raise RuntimeError((folder / "printed.txt").read_text()[-3000:])


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two checkpoints, or what is in them, differ."""
    if isinstance(one, torch.Tensor):
        if not (isinstance(other, torch.Tensor) and torch.equal(one, other)):
            yield place
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one.keys() - set(APART):
            yield from differences(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{place}[{number}]")
    elif one != other:
        yield f"{place} ({one}, {other})"


def logged(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's `metrics.csv`, without times and memory."""
    with (folder / "runs" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = [{key: text for key, text in row.items() if not key.startswith(_TIMES)} for row in csv.DictReader(file)]
    return [row for row in rows if any(text for key, text in row.items() if key not in ("step", "epoch"))]


def interrupted(part: str, times: int, steps_in_all: int, draw: random.Random, scratch: Path) -> dict[str, Any]:
    """Interrupt the job so many times, and compare what it leaves each time, and at the end, with the undisturbed one.

    Raises:
        RuntimeError: A run failed, or ended before it was interrupted often enough.
    """
    stops = part == "stops"
    common = ("--trainer.max_steps", str(steps_in_all), "--checkpoint.every_n_train_steps", "1" if stops else "5")
    common += TWO if stops else ()
    whole, disturbed = scratch / f"{part}-whole", scratch / f"{part}-disturbed"
    whole.mkdir()
    disturbed.mkdir()
    finish(whole, *common, "--trainer.callbacks+", "benchmarks.interruptions.Keep")
    steps, exact, statuses, starting = [], 0, [], 0.0
    for number in range(times):
        process = start(disturbed, *common, "--resume", "auto")
        if number == 0 or stops:
            # Killed before it has saved anything, a run leaves nothing to compare; and until two processes have met, a
            # signal ends each on its own.
            starting = _until_saved(disturbed / LAST, process)
            time.sleep(draw.uniform(0, 3))
        else:
            time.sleep(draw.uniform(0, 2 * starting))
        if process.poll() is not None:
            raise RuntimeError(f"the run ended before it was interrupted {times} times; give more --steps")
        if stops:
            process.terminate()
            statuses.append(process.wait(300))
        else:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        left = read_checkpoint(disturbed / LAST)
        found = list(differences(read_checkpoint(whole / f"{left['global_step']}.ckpt"), left))
        steps.append(left["global_step"])
        exact += not found
        print(f"{part} {number + 1}: step {steps[-1]}, {'equal' if not found else found[:3]}", flush=True)
    finish(disturbed, *common, "--resume", "auto")
    end, other_end = read_checkpoint(whole / LAST), read_checkpoint(disturbed / LAST)
    rows, others = logged(whole), logged(disturbed)
    otherwise = [(row, other) for row, other in zip(rows, others, strict=False) if row != other]
    result: dict[str, Any] = {
        "interruptions": times, "at_steps": steps, "of_steps": end["global_step"], "exact": exact,
        "end_differs_in": list(differences(end, other_end)),
        "logged_rows": [len(rows), len(others)], "logged_otherwise": otherwise[:3],
    }  # fmt: skip
    if stops:
        said = (disturbed / "printed.txt").read_text()
        result |= {"statuses": statuses, "tracebacks": said.count("Traceback")}
    return result


def _until_saved(path: Path, process: subprocess.Popen) -> float:
    """Wait until a process has saved a checkpoint; the seconds that took."""

    def saved() -> float:
        return path.stat().st_mtime if path.is_file() else 0.0

    before, began = saved(), time.perf_counter()
    while saved() == before and process.poll() is None:
        time.sleep(0.02)
    return time.perf_counter() - began


def damaged(times: int, draw: random.Random, scratch: Path) -> dict[str, Any]:
    """Cut off and alter the newest checkpoint of an unfinished run, and see which one `--resume auto` takes."""
    folder = scratch / "damage"
    folder.mkdir()
    finish(folder, "--trainer.max_steps", "20", "--checkpoint.every_n_train_steps", "5")
    (folder / "runs/version_0/.unfinished").write_text("{}")
    last, good = folder / LAST, (folder / LAST).read_bytes()
    counts = {"truncated": 0, "flipped": 0}
    for kind in counts:
        for _ in range(times):
            place = draw.randrange(len(good))
            spoilt = bytearray(good)
            if kind == "truncated":
                del spoilt[place:]
            else:
                spoilt[place] ^= 1 << draw.randrange(8)
            last.write_bytes(spoilt)
            told = io.StringIO()
            with redirect_stderr(told):
                arguments, _ = continue_run(
                    ["fit", "--resume", "auto", "--trainer.default_root_dir", str(folder / "runs")]
                )
            refused = f"{last.resolve()} is damaged" in told.getvalue()
            counts[kind] += refused and arguments[-1].endswith("previous.ckpt")
            try:
                read_checkpoint(last)
            except UserError:
                continue
            counts[kind] -= 1
    return {"of_each": times, "noticed_and_the_one_before_taken": counts, "bytes": len(good)}


def main() -> None:
    """Interrupt runs, and print and write what was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="kills,stops,damage")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--damages", type=int, default=10, help="of each kind")
    parser.add_argument("--steps", type=int, default=400, help="of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places")
    parser.add_argument("--dry", action="store_true", help="write no result")
    given = parser.parse_args()
    result: dict[str, Any] = {"seed": given.seed}
    with tempfile.TemporaryDirectory() as name:
        scratch, draw = Path(name), random.Random(given.seed)
        for part in given.parts.split(","):
            if part == "damage":
                result[part] = damaged(given.damages, draw, scratch)
            else:
                times = given.stops if part == "stops" else given.kills
                result[part] = interrupted(part, times, given.steps, draw, scratch)
            print(part, result[part], flush=True)
    if not given.dry:
        write_result(RESULTS / "interruptions.json", {**result, "environment": environment(torch.device("cpu"))})


if __name__ == "__main__":
    main()
