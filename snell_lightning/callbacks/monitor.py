"""Track the sparsity, the memory and the speed of a run, and sum it up when it ends."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from snell_lightning.adapters import SnellDelta, deltas
from snell_lightning.data.splits import PUBLISHED
from snell_lightning.runs import short

_MIB = 2**20
_MEMORY = ("allocated", "peak", "weights", "gradients", "optimizer", "activations")


class SnellMonitor(Callback):
    """Log what tuning does and what it costs, and print a table when it is done.

    Logged every `every_n_steps` optimizer steps:

    - `sparsity/ratio`: zeros counted in the updates as applied, over all adapted entries; `sparsity/LAYER` per layer.
    - `memory/allocated_mib` and `memory/peak_mib`: the device's allocator; on the CPU the process's resident set.
    - `memory/{weights,gradients,optimizer,activations}_mib`: bytes of parameters and buffers, of gradients, of the
      optimizer's state, and of what autograd keeps of the forward pass for backward, parameters not counted again.
    - `throughput/images_per_second`: training images over all processes; validation time is not counted.

    Memory values are the largest over all processes. Nothing here makes the host wait for the device: values computed
    there are copied in the background and logged when the next step ends.

    Args:
        every_n_steps: Optimizer steps between two loggings; by default the trainer's `log_every_n_steps`.
        per_layer: Log each layer's sparsity besides the ratio over all.
    """

    def __init__(self, every_n_steps: int | None = None, per_layer: bool = True) -> None:
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self.sparsity: float | None = None
        self.peak_bytes = 0
        self._log_dir: str | None = None
        self._bytes = dict.fromkeys(_MEMORY, 0)
        self._saved: _SavedBytes | None = None
        self._pending: _Pending | None = None
        self._logged_step = 0
        self._images = 0
        self._clock = self._started = time.perf_counter()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start clock and peak."""
        self._started = time.perf_counter()
        # Reading `log_dir` talks to the other processes, so all of them do it here.
        self._log_dir = trainer.log_dir
        module = _memory_module(pl_module.device)
        if module is not None:
            module.reset_peak_memory_stats(pl_module.device)
        else:
            rank_zero_info(
                "memory: on the CPU, memory/allocated_mib and memory/peak_mib are the process's resident set"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run has logged the step that it goes on from."""
        self._logged_step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave what lay between the epochs out of the throughput."""
        self._restart_clock()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note when validation starts."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave validation out of the throughput; where it is all there is to do, print its scores."""
        self._clock += time.perf_counter() - self._paused
        if trainer.state.fn == "validate":
            _print_scores(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the scores."""
        _print_scores(trainer, pl_module, "test")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """At a logging step, and at the first, start to count what autograd keeps."""
        if (trainer.global_step + 1) % self._interval(trainer) == 0 or not self._bytes["activations"]:
            self._saved = _SavedBytes(pl_module)
            self._saved.start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is over: read the count."""
        self._stop_counting()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._stop_counting()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients are complete: count their bytes."""
        self._bytes["gradients"] = sum(p.grad.nbytes for p in pl_module.parameters() if p.grad is not None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images; log the last logging step's values, and at a logging step collect new ones."""
        self._images += len(batch[0])
        elapsed = time.perf_counter() - self._clock
        if elapsed > 0:
            rate = self._images * trainer.world_size / elapsed
            pl_module.log("images/s", round(rate, 1), prog_bar=True, logger=False, batch_size=1)
        self._flush(trainer)
        step = trainer.global_step
        if step and step != self._logged_step and step % self._interval(trainer) == 0:
            self._collect(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing stays pending over an epoch's end."""
        self._flush(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Nor is it lost where a run goes on from here in another process."""
        self._flush(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the final state, also of a run shorter than the interval."""
        if trainer.global_step and trainer.global_step != self._logged_step:
            self._collect(trainer, pl_module)
            self._flush(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the closing table."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _print(trainer, self._summary(trainer, pl_module))

    def _interval(self, trainer: Trainer) -> int:
        return max(1, self.every_n_steps or trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def _restart_clock(self) -> None:
        self._clock, self._images = time.perf_counter(), 0

    def _stop_counting(self) -> None:
        if self._saved is not None:
            self._bytes["activations"] = self._saved.stop()
            self._saved = None

    def _collect(self, trainer: Trainer, module: LightningModule) -> None:
        """Gather this step's values on the device and start their way to the host."""
        self._logged_step = trainer.global_step
        self._bytes["weights"] = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
        self._bytes["optimizer"] = sum(_state_bytes(optimizer) for optimizer in trainer.optimizers)
        self._bytes["allocated"], self._bytes["peak"] = device_memory(module.device)
        memory = torch.tensor([self._bytes[name] / _MIB for name in _MEMORY], device=module.device)
        memory = trainer.strategy.reduce(memory, reduce_op="max")
        elapsed = time.perf_counter() - self._clock
        rate = self._images * trainer.world_size / elapsed if elapsed > 0 else 0.0
        self._restart_clock()
        if trainer.is_global_zero:
            by_layer = _deltas_by_layer(module)
            zeros = [count_zeros(updates) for updates in by_layer.values()]
            values = torch.cat([memory, torch.stack(zeros).to(memory.dtype)]) if zeros else memory
            sizes = [sum(d.in_features * d.out_features for d in updates) for updates in by_layer.values()]
            # Lightning logs the values of its first step at 0.
            self._pending = _Pending.start(self._logged_step - 1, values, dict(zip(by_layer, sizes, strict=True)), rate)

    def _flush(self, trainer: Trainer) -> None:
        """Log what has arrived on the host."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        values = pending.finish()
        metrics = {f"memory/{name}_mib": value for name, value in zip(_MEMORY, values, strict=False)}
        metrics["throughput/images_per_second"] = pending.images_per_second
        self.peak_bytes = max(self.peak_bytes, int(metrics["memory/peak_mib"] * _MIB))
        if pending.sizes:
            zeros = dict(zip(pending.sizes, values[len(_MEMORY) :], strict=True))
            self.sparsity = sum(zeros.values()) / sum(pending.sizes.values())
            metrics["sparsity/ratio"] = self.sparsity
            if self.per_layer:
                metrics |= {f"sparsity/{layer}": zeros[layer] / size for layer, size in pending.sizes.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=pending.step)

    def _summary(self, trainer: Trainer, module: LightningModule) -> Table:
        table = _table("Run finished")
        checkpoint: Any = trainer.checkpoint_callback
        best = getattr(checkpoint, "best", None)
        if best is not None and best["score"] is not None:
            how = PUBLISHED if chosen_by_test(trainer) else "selected on validation data"
            told = f"{best['score']:.4f}  (epoch={best['epoch']}, {how})"
            table.add_row(f"best {checkpoint.monitor}", told)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in module.parameters())
        table.add_row("trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})")
        if self.sparsity is not None:
            table.add_row("sparsity of the updates", f"{self.sparsity:.4f}  (zeros counted)")
        kind = "resident set of the process" if _memory_module(module.device) is None else "device allocator"
        table.add_row("peak memory", f"{self.peak_bytes / _MIB:,.0f} MiB  ({kind}, largest of {trainer.world_size})")
        kept = self._bytes["activations"] / _MIB
        table.add_row("kept for backward", f"{kept:,.1f} MiB")
        table.add_row("time", f"{time.perf_counter() - self._started:,.1f} s for {trainer.global_step:,} steps")
        adapter = getattr(checkpoint, "adapter_path", None)
        if adapter is not None and adapter.is_file():
            table.add_row("adapter", f"{short(adapter)}  ({adapter.stat().st_size / 1000:,.0f} kB)")
        if getattr(checkpoint, "last_model_path", ""):
            table.add_row("to resume", f"--ckpt_path {short(checkpoint.last_model_path)}")
        if self._log_dir:
            table.add_row("curves", f"tensorboard --logdir {short(self._log_dir)}")
        return table


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    return table


def chosen_by_test(trainer: Trainer) -> bool:
    """Whether the test images choose the epoch, as in the papers."""
    return getattr(getattr(trainer, "datamodule", None), "protocol", "") == "published"


def _print(trainer: Trainer, table: Table) -> None:
    bar = getattr(trainer.progress_bar_callback, "progress", None)
    if isinstance(bar, Progress):
        # Else it would be drawn over the table.
        bar.stop()
    Console().print(table)


def _print_scores(trainer: Trainer, module: LightningModule, stage: str) -> None:
    """A table of the scores of an evaluation, over which images, and of which model."""
    if not trainer.is_global_zero:
        return
    table = _table("Tested" if stage == "test" else "Validated")
    logged_as = getattr(module, "logged_as", {}).get(stage, stage)
    for name, value in sorted(trainer.callback_metrics.items()):
        if name.startswith(f"{logged_as}/"):
            table.add_row(name, f"{float(value):.6f}")
    data: Any = getattr(trainer, "datamodule", None)
    split = getattr(data, "eval_split", stage) if stage == "test" else stage
    accuracy = trainer.callback_metrics.get(f"{logged_as}/acc1")
    if accuracy is not None and (count := getattr(module, "images_read", 0)):
        right = round(float(accuracy) * count)
        table.add_row("right", f"{right:,} of {count:,} images ({split})")
    if chosen_by_test(trainer) and split in ("val", "test"):
        table.add_row("note", PUBLISHED)
    source = trainer.ckpt_path or module.hparams.get("adapter_file")
    if source:
        table.add_row("model", short(str(source)))
    _print(trainer, table)


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes in use now and at most so far: of the device's allocator, or of this process if the device is the CPU."""
    module = _memory_module(device)
    if module is not None:
        return module.memory_allocated(device), module.max_memory_allocated(device)
    info = psutil.Process().memory_info()
    # Linux keeps the peak itself; elsewhere psutil knows it under another name, or not at all.
    peak = getattr(info, "peak_wset", 0)
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak = int(line.split()[1]) * 1024
    return info.rss, max(peak, info.rss)


@torch.no_grad()
def count_zeros(updates: list[SnellDelta]) -> Tensor:
    """Entries that are zero in these updates as applied, as a tensor of no dimensions on their device."""
    return torch.stack([(update.weight() == 0).sum() for update in updates]).sum()


def _deltas_by_layer(module: LightningModule) -> dict[str, list[SnellDelta]]:
    by_layer: dict[str, list[SnellDelta]] = {}
    for name, delta in deltas(module.model).items():  # type: ignore[arg-type]
        by_layer.setdefault(name.rpartition(".deltas.")[0], []).append(delta)
    return by_layer


def _memory_module(device: torch.device) -> Any:
    """The torch module that counts a device's memory; None for the CPU and devices without such counts."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return module if hasattr(module, "max_memory_allocated") else None


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )


class _SavedBytes:
    """Counts the bytes that autograd keeps for backward: each storage once, parameters and buffers left out."""

    def __init__(self, module: LightningModule) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        self._sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def start(self) -> None:
        self._hooks.__enter__()

    def stop(self) -> int:
        self._hooks.__exit__(None, None, None)
        return sum(self._sizes.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


@dataclass
class _Pending:
    """Values on their way from the device to the host."""

    step: int
    values: Tensor
    sizes: dict[str, int]
    images_per_second: float
    done: torch.Event | None

    @classmethod
    def start(cls, step: int, values: Tensor, sizes: dict[str, int], images_per_second: float) -> "_Pending":
        """Start to copy `values` to the host."""
        if values.device.type == "cpu":
            return cls(step, values, sizes, images_per_second, None)
        host = torch.empty_like(values, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        done = torch.Event(values.device)
        done.record()
        return cls(step, host, sizes, images_per_second, done)

    def finish(self) -> list[float]:
        """The values; a step after `start` they are there already."""
        if self.done is not None:
            self.done.synchronize()
        return self.values.tolist()
