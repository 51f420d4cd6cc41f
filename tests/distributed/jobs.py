"""The same job started on test hosts in the ways that clusters start it, and what is left of it."""

import csv
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.distributed.hosts import Hosts

ROOT = Path(__file__).parents[2]
FIT = (
    "fit", "--config", "vit.yaml", "--trainer.accelerator", "cpu", "--data.augmentation", "none",
    "--trainer.accumulate_grad_batches", "2", "--trainer.gradient_clip_val", "0.5", "--model.optimizer.lr", "1e-3",
    "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "5",
)  # fmt: skip
"""The embedded job, accumulating and clipping. Each test adds how long it is."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun(*options: str) -> tuple[str, ...]:
    """The command that starts processes through torchrun; options of the job follow."""
    return (sys.executable, "-m", "torch.distributed.run", *options, "-m", "snell_lightning", *FIT)


def elastic(nodes: str, restarts: int = 0) -> tuple[str, ...]:
    """A torchrun command for two processes a host, which meet at the first host, and start again if one is lost."""
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "host-0:29500", "--rdzv-id", "job")
    return torchrun("--nnodes", nodes, "--nproc-per-node", "2", "--max-restarts", str(restarts), *meet)


def plain(*options: str) -> tuple[str, ...]:
    """The command that is one process, or starts the others of its host itself."""
    return (sys.executable, "-m", "snell_lightning", *FIT, *options)


def slurm(task: int, tasks: int, nodes: int, **more: str) -> dict[str, str]:
    """The environment in which SLURM's srun starts a task, as many on each node."""
    per_node = tasks // nodes
    return {
        **ENVIRONMENT,
        "SLURM_JOB_ID": "4017",
        "SLURM_JOB_NAME": "fit",
        "SLURM_NTASKS": str(tasks),
        "SLURM_NNODES": str(nodes),
        "SLURM_NODELIST": f"host-[0-{nodes - 1}]" if nodes > 1 else "host-0",
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": str(task % per_node),
        "SLURM_NODEID": str(task // per_node),
        **more,
    }


def start(
    hosts: Hosts, host: int, folder: Path, command: Sequence[str], environment: Mapping[str, str] = ENVIRONMENT
) -> subprocess.Popen:
    """Start a command on a host, in the folder that all hosts share."""
    return hosts.start(host, command, folder / f"host-{host}.txt", folder=folder, environment=environment)


def wait(processes: Sequence[subprocess.Popen], seconds: float = 140) -> list[int]:
    """Wait for processes, and give their statuses."""
    deadline = time.monotonic() + seconds
    return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in processes]


def wait_for(what: Callable[[], bool], seconds: float = 100) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def printed(folder: Path) -> str:
    """What all hosts have printed."""
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(folder.glob("host-*.txt")))


def last(folder: Path) -> dict[str, Any]:
    """The last checkpoint of a run."""
    return torch.load(folder / "runs/version_0/checkpoints/last.ckpt", weights_only=True)


def scores(folder: Path, name: str = "val/acc1") -> list[float]:
    """The scores on validation data that a run logged."""
    with (folder / "runs/version_0/metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def rank_of(process: int) -> int | None:
    """The rank of a process that torchrun has started; None for any other."""
    command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    if "snell_lightning" not in command or "torch.distributed.run" in command or command.startswith("timeout"):
        return None
    environment = Path(f"/proc/{process}/environ").read_bytes().replace(b"\0", b"\n").decode()
    found = re.search(r"^RANK=(\d+)$", environment, flags=re.MULTILINE)
    return int(found[1]) if found else None


def kill_rank(hosts: Hosts, host: int, rank: int) -> None:
    """Kill one of a host's training processes."""
    for process in hosts.processes(host):
        if rank_of(process) == rank:
            os.kill(process, 9)
            return
    raise AssertionError(f"no process of rank {rank} on host {host}")
