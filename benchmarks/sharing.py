"""Two jobs on one machine: seconds a step of a job alone, and of two at once, by how OpenMP's threads wait.

    python -m benchmarks.sharing

A job is full fine-tuning of a ViT-S/14 with random weights on the CPU, in a process of its own with as many threads as
there are cores. Alone, one process for each way of waiting is kept, and they take their steps in turns; then two
processes at a time take theirs together.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, environment, in_turns, median, print_table, ratio, write_result
from snell_lightning.waiting import spin_briefly

RESULT = RESULTS / "sharing.json"
_JOB = """
import sys, time, timm, torch
import torch.nn.functional as F

image_size, batch = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
model = timm.create_model("vit_small_patch14_dinov2", img_size=image_size, num_classes=10)
optimizer = torch.optim.AdamW(model.parameters())
images, labels = torch.randn(batch, 3, image_size, image_size), torch.arange(batch) % 10


def step():
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


step()
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
        step()
    print((time.perf_counter() - start) / int(line), flush=True)
"""


class Job:
    """A process that takes steps when it is told to."""

    def __init__(self, settings: dict[str, str], arguments: argparse.Namespace) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
        command = [sys.executable, "-c", _JOB, str(arguments.image_size), str(arguments.batch)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**clean, **settings}
        )
        assert self._read() == "ready"

    def start(self, steps: int) -> None:
        """Take so many steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()

    def seconds(self) -> float:
        """Seconds a step, when they are done."""
        return float(self._read())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def alone(job: Job, steps: int) -> float:
    """Seconds a step of a job that has the machine to itself."""
    job.start(steps)
    return job.seconds()


def together(settings: dict[str, str], arguments: argparse.Namespace) -> float:
    """Seconds a step of the slower of two jobs."""
    jobs = [Job(settings, arguments) for _ in range(2)]
    for job in jobs:
        job.start(arguments.steps)
    slower = max(job.seconds() for job in jobs)
    for job in jobs:
        job.close()
    return slower


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharing", description=__doc__)
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="in a row, of which the mean is one measurement")
    parser.add_argument("--rounds", type=int, default=12, help="of a job alone")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()

    import torch

    ours: dict[str, str] = {}
    spin_briefly(ours)
    ways = {"default": {}, "ours": ours, "asleep": {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}}
    jobs = {name: Job(settings, arguments) for name, settings in ways.items()}
    one = in_turns({name: lambda job=job: alone(job, arguments.steps) for name, job in jobs.items()}, arguments.rounds)
    for job in jobs.values():
        job.close()
    two = {name: together(settings, arguments) for name, settings in ways.items()}

    rows: dict[str, Any] = {
        name: {
            "settings": settings,
            "alone": median(one[name]),
            "alone_over_default": ratio(median(one[name]), median(one["default"])),
            "alone_each": [round(value, 4) for value in one[name]],
            "two_at_once": round(two[name], 4),
            "two_over_alone": ratio(two[name], median(one[name])),
        }
        for name, settings in ways.items()
    }
    columns = ("alone", "alone_over_default", "two_at_once", "two_over_alone")
    print_table(
        "seconds a step", ("threads wait", *columns), [[n, *(row[c] for c in columns)] for n, row in rows.items()]
    )
    what = f"full fine-tuning of ViT-S/14, {arguments.image_size} px, batch {arguments.batch}, seconds a step of a job"
    write_result(
        arguments.output,
        {"what": what, "ways": rows, **environment(torch.device("cpu")), "threads_wait": "by row"},
    )


if __name__ == "__main__":
    main()
