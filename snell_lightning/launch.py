"""What started this process: how many processes there are is the launcher's to say, and nobody should write it twice.

A trainer that does not know of the other processes would train all of it in each of them. So counts that the config
leaves open are taken from the launcher's environment, and counts that it gives must agree with it.
"""

import inspect
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from snell_lightning.adapters.errors import UserError
from snell_lightning.peers import introduce


@dataclass(frozen=True)
class Launch:
    """Processes that a launcher started.

    Attributes:
        launcher: Its name.
        nodes: Machines.
        per_node: Processes on each.
    """

    launcher: str
    nodes: int
    per_node: int

    def __str__(self) -> str:
        """For example `torchrun started 4 processes, 2 on each of 2 machines`."""
        where = f", {self.per_node} on each of {self.nodes} machines" if self.nodes > 1 else " on one machine"
        return f"{self.launcher} started {_processes(self.nodes * self.per_node)}{where}"


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What torchrun, SLURM or MPI says of this process; None where it was started by none of them.

    Raises:
        UserError: The processes cannot find each other, or are not the same number on every machine.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        world, per_node = int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"])
        restarts = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
        if restarts != "0" and world > 1 and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            raise UserError(
                f"torchrun may start processes again (--max-restarts {restarts}), and the store that it shares would "
                "give them the addresses of those that are gone; put TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 into its "
                "environment on every machine"
            )
        return Launch("torchrun", _nodes("torchrun", world, per_node), per_node)
    # Lightning takes these two for a shell in which somebody tries things out.
    if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        world, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", 1))
        if world % nodes:
            raise UserError(
                f"SLURM started {world} tasks on {nodes} machines; ask for as many on each (--ntasks-per-node)"
            )
        return Launch("SLURM", nodes, world // nodes)
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(environment.get(name, 1)) > 1 and not _lightning_knows_mpi():
            raise UserError(
                f"mpirun started {environment[name]} processes, which find each other with the package mpi4py alone; "
                "install it, or start with torchrun"
            )
    return None


# Where other launchers that Lightning knows say how processes find each other.
_OTHERS = ("LSB_JOBID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def adopt(
    trainer: MutableMapping[str, Any], launch: Launch | None, environment: Mapping[str, str] = os.environ
) -> str | None:
    """Take over the launcher's counts where a trainer's settings leave them open.

    Args:
        trainer: The settings, changed in place.
        launch: What `launched` says.
        environment: Variables in which those who start by hand say where the machines are.

    Returns:
        A line that says what was taken over; None where nothing was.

    Raises:
        UserError: The settings say something else, or the processes have not a device each.
    """
    if launch is None:
        placed = "MASTER_ADDR" in environment and any(
            name in environment for name in ("NODE_RANK", "GROUP_RANK", "RANK")
        )
        if (trainer.get("num_nodes") or 1) > 1 and not placed and not any(name in environment for name in _OTHERS):
            raise UserError(
                f"trainer.num_nodes is {trainer['num_nodes']}, and nothing says where the other machines are; start "
                "with torchrun or srun, or set MASTER_ADDR, MASTER_PORT and NODE_RANK in each machine's environment"
            )
        return None
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes") or 1
    count = _count(devices)
    if nodes not in (1, launch.nodes):
        raise UserError(f"{launch}, and trainer.num_nodes is {nodes}; leave it out, or start on {nodes} machines")
    if count is not None and count != launch.per_node:
        raise UserError(
            f"{launch}, and trainer.devices is {devices}; leave it out, or start {_processes(count)} on each machine"
        )
    _require_devices(trainer.get("accelerator") or "auto", launch)
    found: dict[str, Any] = {"num_nodes": launch.nodes, "devices": launch.per_node}
    if launch.nodes * launch.per_node > 1 and trainer.get("strategy") in (None, "auto"):
        found["strategy"] = "ddp"
    if count is not None:
        # As given: a list says which devices.
        del found["devices"]
    changed = {key: value for key, value in found.items() if trainer.get(key) != value}
    trainer.update(changed)
    if not changed or launch.nodes * launch.per_node == 1:
        return None
    return f"{launch}: " + ", ".join(f"trainer.{key} {value}" for key, value in changed.items())


def require_agreement(world_size: int, environment: Mapping[str, str] = os.environ) -> None:
    """See that a trainer knows of all processes, whatever started them.

    Raises:
        UserError: It does not.
    """
    said = environment.get("WORLD_SIZE")
    if said is not None and int(said) != world_size:
        raise UserError(
            f"the environment says that there are {said} processes (WORLD_SIZE), and trainer.devices and "
            f"trainer.num_nodes make {world_size}; each would train on its own"
        )


def join(trainer: Mapping[str, Any], launch: Launch | None, timeout: int) -> None:
    """Have all processes of a launcher meet before data are listed and a backbone is loaded.

    From here on a process that ends is noticed by the others, whatever it ends of.

    Args:
        trainer: The settings, after `adopt`.
        launch: What `launched` says.
        timeout: Seconds to wait for others, then and later.
    """
    strategy = trainer.get("strategy")
    if launch is None or launch.nodes * launch.per_node == 1 or not _is_ddp(strategy):
        return
    if launch.launcher == "SLURM":
        # Lightning refuses tasks that were asked for in all (--ntasks), however they have been divided.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.per_node))
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    try:
        Fabric(
            accelerator=trainer.get("accelerator") or "auto",
            devices=trainer.get("devices") or launch.per_node,
            num_nodes=launch.nodes,
            strategy=DDPStrategy(timeout=timedelta(seconds=timeout)),
        ).launch()
    except RuntimeError as error:
        raise UserError(f"{launch}, which did not find each other: {' '.join(str(error).split())}") from error
    introduce()


def untried(strategy: Any) -> str | None:
    """What to say of a strategy that nobody has tried with this package; None for those that are tested.

    Raises:
        UserError: It cannot work.
    """
    name = _name(strategy)
    if name == "ModelParallelStrategy":
        raise UserError("ModelParallelStrategy divides layers, and adapted ones cannot be divided yet; use ddp")
    if name in ("auto", "single_device", "SingleDeviceStrategy") or _is_ddp(strategy):
        return None
    return f"trainer.strategy {name} has not been tried with this package, whose backbones are frozen: ddp has"


def _is_ddp(strategy: Any) -> bool:
    return _name(strategy).startswith(("ddp", "DDPStrategy"))


def _name(strategy: Any) -> str:
    """A strategy's name, or the name of its class."""
    path = (
        strategy.get("class_path", "") if isinstance(strategy, Mapping) or hasattr(strategy, "class_path") else strategy
    )
    return str(path or "auto").rpartition(".")[2]


def work_together(strategy: Any, timeout: int) -> None:
    """Set up Lightning's DDP strategy for a backbone that is frozen.

    Args:
        strategy: It, before it is used.
        timeout: Seconds to wait for other processes.
    """
    from torch.distributed.constants import default_pg_timeout
    from torch.nn.parallel import DistributedDataParallel

    if strategy._timeout == default_pg_timeout:
        # Not given for the strategy itself.
        strategy._timeout = timedelta(seconds=timeout)
    # Buffers are the backbone's, which stay as they are: by default all of them would travel before every step.
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    strategy._ddp_kwargs.setdefault(buffers, False)
    # Gradients are reduced where they lie.
    strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)


def _nodes(launcher: str, world: int, per_node: int) -> int:
    if world % per_node:
        raise UserError(f"{launcher} started {world} processes, {per_node} of them here; start as many on each machine")
    return world // per_node


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _count(devices: Any) -> int | None:
    """How many devices a setting names; None where it leaves that open."""
    if devices in (None, "auto", -1, "-1"):
        return None
    if isinstance(devices, str):
        # As lightning has it: a number alone is a count, and several are a list.
        return len([part for part in devices.split(",") if part.strip()]) if "," in devices else int(devices)
    return devices if isinstance(devices, int) else len(devices)


def _require_devices(accelerator: Any, launch: Launch) -> None:
    """Raise where several processes on a machine would see one accelerator, or fewer than there are processes."""
    import torch

    if accelerator == "cpu" or not torch.accelerator.is_available():
        return
    seen = torch.accelerator.device_count()
    if seen < launch.per_node:
        raise UserError(
            f"{launch}, and this one sees {seen} device(s); let each see all of its machine's (under SLURM with "
            "--gpus-per-node in place of --gpus-per-task), or set trainer.accelerator to cpu"
        )


def _lightning_knows_mpi() -> bool:
    from lightning.fabric.plugins.environments import MPIEnvironment

    return MPIEnvironment.detect()
