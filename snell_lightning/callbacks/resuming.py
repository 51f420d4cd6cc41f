"""What a run needs besides weights, optimizer and loops in order to go on as if it had not been stopped.

Each process has random generators of its own, and gradients of its own while it waits for more of them. The place in
the epoch is the loader's to say (`data/samplers.py`).
"""

import random
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor

from snell_lightning.data.dataset import ImageLoader


def of_all_processes(trainer: Trainer, module: LightningModule) -> list[dict[str, Any]]:
    """What each process has of its own, the same list on all of them, in types that load without running code."""
    own = {"random": _random_state(), "gradients": _gradients(module) if accumulates(trainer) else []}
    everything: list[Any] = [own]
    if trainer.world_size > 1:
        everything = [None] * trainer.world_size
        torch.distributed.all_gather_object(everything, own)
    return everything


def go_on(trainer: Trainer, module: LightningModule, processes: list[dict[str, Any]]) -> None:
    """Give this process what it had, or with other processes than then what they had in common.

    Args:
        trainer: Before its first step.
        module: What it trains.
        processes: What `of_all_processes` said.
    """
    _leave_ended_epoch(trainer)
    _go_to_place_in_epoch(trainer)
    same = len(processes) == trainer.world_size
    if same:
        _set_random_state(processes[trainer.global_rank]["random"])
    gradients = [each["gradients"] for each in processes if each["gradients"]]
    if not gradients:
        return
    if not accumulates(trainer):
        rank_zero_info("resume: gradients that waited for more are dropped, as steps are not of the size they were")
        return
    own = gradients[trainer.global_rank] if same else [_mean(each) for each in zip(*gradients, strict=True)]
    for parameter, gradient in zip(_trained(module), own, strict=True):
        parameter.grad = None if gradient is None else gradient.to(parameter.device)


def accumulates(trainer: Trainer) -> bool:
    """Whether gradients wait for those of more batches before a step is made."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def _leave_ended_epoch(trainer: Trainer) -> None:
    """Begin the next epoch where one has ended, as a run does that is not interrupted.

    Lightning does, where there is a number of epochs; where there is one of steps, it goes back into the epoch that has
    ended, and makes a step in it unless a validation has been its last act.
    """
    loop = trainer.fit_loop
    epochs: list[Any] = [loop.epoch_progress.current, loop.epoch_progress.total]
    if epochs[0].processed != epochs[0].started:
        return
    for each in epochs:
        each.completed = each.processed
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        part._restarting = False
        part.reset_restart_stage()


def _go_to_place_in_epoch(trainer: Trainer) -> None:
    """Tell the loader; where batches are not of the size they were, count how many of the present size are done."""
    loop = trainer.fit_loop
    # Lightning does so when it makes the loader, which is before it reads the checkpoint if the schedule wants to know
    # how many steps there are.
    loop._load_combined_loader_states()
    loaders = [] if loop._combined_loader is None else loop._combined_loader.flattened
    if len(loaders) != 1 or not isinstance(loader := loaders[0], ImageLoader):
        return
    if loader.state_dict().get("epoch") != asdict(loop.epoch_progress.current)["processed"]:
        return
    progress = loop.epoch_loop.batch_progress
    surplus = progress.current.ready - loader.batches_done()
    counts: list[Any] = [progress.current, progress.total]
    for count in counts:
        for name, value in asdict(count).items():
            setattr(count, name, value - surplus)


def _trained(module: LightningModule) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad and not isinstance(p, DTensor)]


def _gradients(module: LightningModule) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.detach().cpu().clone() for p in _trained(module)]


def _mean(gradients: tuple[Tensor | None, ...]) -> Tensor | None:
    there = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(there).mean(0) if there else None


def _random_state() -> dict[str, Any]:
    """The state of this process's random generators."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(numbers), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            cached,
        ],
    }
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None
        state["accelerator"] = torch.get_device_module(device).get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "accelerator" in state and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None
        torch.get_device_module(device).set_rng_state(state["accelerator"])
