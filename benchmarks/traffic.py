"""What travels between processes in a training step, and what DDP's settings cost in memory: by method, over gloo.

    python -m benchmarks.traffic

Two processes train a ViT-B/16 with random weights on the CPU, for each method and each of DDP's settings in processes
of their own: torch's defaults, the settings that this package makes, and those with a static graph. Bytes are counted
where DDP hands over its buckets. Peaks are those of the resident set of the first process.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import RESULTS, environment, mebibytes, median, print_table, ratio, write_result
from benchmarks.methods import Backbone, Settings, build, parse_variants
from snell_lightning.launch import work_together

RESULT = RESULTS / "traffic.json"
METHODS = "full, lora:rank=8, snell:rank=8"
_strategy = DDPStrategy()
work_together(_strategy, timeout=1800)
OWN = _strategy._ddp_kwargs
SETTINGS: dict[str, dict[str, Any]] = {"torch's": {}, "ours": OWN, "ours, static graph": {**OWN, "static_graph": True}}


def work(method: str, settings: str, backbone: str, batch: int, steps: int) -> None:
    """One of the processes: train, and print what was counted."""
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    (variant,) = parse_variants(method, Settings())
    subject = build(variant, Backbone(backbone), batch, torch.device("cpu"))
    model = subject.model
    subject.model = DistributedDataParallel(model, **SETTINGS[settings])
    reduced = 0

    def count(group: distributed.ProcessGroup, bucket: distributed.GradBucket) -> Future[Tensor]:
        nonlocal reduced
        reduced += bucket.buffer().nbytes
        return allreduce_hook(group, bucket)

    subject.model.register_comm_hook(distributed.group.WORLD, count)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        subject.step()
        seconds.append(time.perf_counter() - start)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if distributed.get_rank() == 0:
        counted = {"reduced": reduced // steps, "trained": trained, "peak": peak, "seconds": seconds[1:]}
        print(json.dumps(counted), flush=True)
    distributed.destroy_process_group()


def measure(method: str, settings: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What two processes count."""
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "benchmarks.traffic"]
    given = ["--work", method, settings, "--backbone", arguments.backbone, "--batch", str(arguments.batch)]
    done = subprocess.run(
        [sys.executable, *run, *given, "--steps", str(arguments.steps)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--batch", type=int, default=2, help="images for each process")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work, arguments.backbone, arguments.batch, arguments.steps)
        return
    methods = [method.strip() for method in arguments.methods.split(",")]
    rounds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for method in methods:
            for settings in SETTINGS:
                rounds.setdefault((method, settings), []).append(measure(method, settings, arguments))
    rows = []
    for (method, settings), counted in rounds.items():
        usual = rounds[method, "torch's"]
        rows.append(
            {
                "method": method,
                "settings": settings,
                "trained_bytes": counted[0]["trained"],
                "reduced_bytes_per_step": counted[0]["reduced"],
                "peak_bytes": median([each["peak"] for each in counted]),
                "peak_ratio": ratio(
                    median([each["peak"] for each in counted]), median([each["peak"] for each in usual])
                ),
                "seconds_per_step": median([second for each in counted for second in each["seconds"]]),
            }
        )
    print_table(
        f"{arguments.backbone}, two processes, {arguments.batch} images each",
        ("method", "DDP's settings", "trained, MiB", "reduced a step, MiB", "peak, MiB", "of torch's", "s a step"),
        [
            (
                row["method"],
                row["settings"],
                mebibytes(row["trained_bytes"]),
                mebibytes(row["reduced_bytes_per_step"]),
                mebibytes(int(row["peak_bytes"])),
                row["peak_ratio"],
                row["seconds_per_step"],
            )
            for row in rows
        ],
    )
    asked = {name: getattr(arguments, name) for name in ("backbone", "batch", "steps", "rounds")}
    write_result(arguments.out, {"settings": asked, "environment": environment(torch.device("cpu")), "rows": rows})


if __name__ == "__main__":
    main()
