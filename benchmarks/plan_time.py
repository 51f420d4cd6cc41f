"""Seconds that help texts and memory plans take as commands, from start to end.

python -m benchmarks.plan_time
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import RESULTS, environment, in_turns, median, print_table, seconds, write_result
from snell_lightning.waiting import spin_briefly

RESULT = RESULTS / "plan_time.json"
_PLAN = ("memory", "--config", "vit.yaml", "--config", "backbone/vit_b16.yaml")
_GIANT = ("--model.backbone", "vit_giant_patch14_dinov2", "--data.image_size", "224")
COMMANDS = {
    "--help": ("--help",),
    "fit --help": ("fit", "--help"),
    "memory, ViT-B/16": _PLAN,
    "memory, ViT-B/16, --budget 8GiB": (*_PLAN, "--budget", "8GiB"),
    "memory, ViT-g/14 (1.1 billion parameters)": (*_PLAN, *_GIANT),
}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_time", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()

    import torch

    cpu = torch.device("cpu")
    settings = dict(os.environ)
    spin_briefly(settings)
    root = Path(__file__).resolve().parent.parent

    def run(command: tuple[str, ...]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            program = [sys.executable, "-m", "snell_lightning", *command]
            environ = {**settings, "PYTHONPATH": str(root)}
            return seconds(
                lambda: subprocess.run(program, cwd=folder, env=environ, check=True, capture_output=True), cpu
            )

    measured = in_turns(
        {name: lambda command=command: run(command) for name, command in COMMANDS.items()}, arguments.rounds, warmup=1
    )
    rows = {
        name: {"seconds": median(values), "each": [round(v, 2) for v in values]} for name, values in measured.items()
    }
    print_table("seconds of a command", ("command", "median"), [[name, row["seconds"]] for name, row in rows.items()])
    write_result(arguments.output, {"what": "commands, from start to end", "commands": rows, **environment(cpu)})


if __name__ == "__main__":
    main()
