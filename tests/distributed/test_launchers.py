"""One job on two hosts however it is started, and what is said when a process fails."""

from pathlib import Path

import pytest
import torch

from tests.distributed import jobs
from tests.distributed.hosts import Hosts

# All that mixed precision, bf16 weights, accumulation and clipping bring, over three optimizer steps.
MIXED = (
    "--config", "trainer/multinode.yaml", "--config", "trainer/bf16.yaml", "--model.backbone_dtype", "bfloat16",
    "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "6", "--trainer.limit_val_batches", "1",
    "--model.adapter.rank", "4", "--data.batch_size", "4",
)  # fmt: skip


def by_torchrun(host: int) -> tuple[tuple[str, ...], dict[str, str]]:
    where = ("--node-rank", str(host), "--master-addr", "host-0", "--master-port", "29400")
    return jobs.torchrun("--nnodes", "2", "--nproc-per-node", "1", *where), jobs.ENVIRONMENT


def by_srun(host: int) -> tuple[tuple[str, ...], dict[str, str]]:
    return jobs.plain(), jobs.slurm(host, tasks=2, nodes=2)


def by_lightning(host: int) -> tuple[tuple[str, ...], dict[str, str]]:
    where = {"MASTER_ADDR": "host-0", "MASTER_PORT": "29400", "NODE_RANK": str(host)}
    return jobs.plain("--trainer.num_nodes", "2", "--trainer.devices", "1"), {**jobs.ENVIRONMENT, **where}


def test_launchers_give_the_same_parameters_to_the_last_bit(needs_hosts: None, tmp_path: Path) -> None:
    ended = {}
    for launcher in (by_torchrun, by_srun, by_lightning):
        folder = tmp_path / launcher.__name__
        folder.mkdir()
        with Hosts(2) as hosts:
            if launcher is by_srun:
                # Nothing else depends on how fast the network is.
                hosts.slow(1, delay=0.003, loss=0.01)
            commands = [launcher(host) for host in range(2)]
            started = [
                jobs.start(hosts, host, folder, (*command, *MIXED), environment)
                for host, (command, environment) in enumerate(commands)
            ]
            assert jobs.wait(started) == [0, 0], jobs.printed(folder)
        assert [path.name for path in (folder / "runs").iterdir()] == ["version_0"]
        ended[launcher.__name__] = jobs.last(folder)
    first, *others = ended.values()
    assert first["global_step"] == 3
    for other in others:
        assert other["state_dict"].keys() == first["state_dict"].keys()
        assert all(torch.equal(tensor, first["state_dict"][name]) for name, tensor in other["state_dict"].items())


@pytest.mark.parametrize("step", [0, 1], ids=["before there is a model", "in the second step"])
def test_a_process_that_fails_is_named_and_the_others_end(needs_hosts: None, step: int, tmp_path: Path) -> None:
    fail = ("--trainer.callbacks+", "tests.distributed.callbacks.Fail", "--trainer.callbacks.rank", "1")
    command = jobs.plain(*MIXED, *fail, "--trainer.callbacks.step", str(step))
    with Hosts(2) as hosts:
        started = [jobs.start(hosts, host, tmp_path, command, jobs.slurm(host, tasks=2, nodes=2)) for host in range(2)]
        assert jobs.wait(started, seconds=60) == [1, 1], jobs.printed(tmp_path)
    said = (tmp_path / "host-0.txt").read_text()
    (line,) = (line for line in said.splitlines() if line.startswith("error"))
    # What is raised while settings are read is told in jsonargparse's words.
    what = "RuntimeError: the disk is on fire" if step else ""
    assert line.startswith(f"error [process 0]: process 1 on host-1: {what}")
    assert line.endswith("(it failed first, and so all processes end)")
    assert "Traceback" not in said
