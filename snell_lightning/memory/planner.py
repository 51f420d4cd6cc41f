"""Plan the memory of a training step: run the step on fake tensors, which have shapes but no data, and count.

    model under fake tensors ──> forward ──> zero_grad ──> backward ──> optimizer step
                                    │            counted by `StorageTracker`: (storage, +bytes), (storage, -bytes), ...
                                    v
    the same at a second batch size: where both made and freed the same storages in the same order, each storage's
    size is affine in the batch size, and the whole step is known for every other batch size without running it

The model is built by the code that a run uses, so whatever a backbone or an adapter keeps or makes is in the plan. The
order within a step is Lightning's: the gradients of the step before live until forward is over. What is planned is a
step on one device after the first one, when the optimizer's state exists.

Counted are tensors. Left out are what an allocator rounds up and caches, a GPU's context, and the workspaces of
libraries. Attention and convolutions are those of the CPU; a GPU's differ in small buffers only. Of an adapter's drop
path the plan is the worst case, that it drops the update of every image.
"""

import gc
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from snell_lightning.adapters import UserError
from snell_lightning.backbones import create_backbone, data_config, require_image_size
from snell_lightning.backbones.sizes import sides
from snell_lightning.memory.cut import Cut
from snell_lightning.memory.job import WHOLE, Job, adapt, forward_context
from snell_lightning.memory.repeat import Repeats
from snell_lightning.memory.trace import AffineTrace, Plan, Recorder, Trace, read_number

# Tensors up to so many elements are made with data while a model is built: constructors read some of them.
_SMALL = 4096
# Between one of the first and the last a step is computed from the two. A batch of one is special to many operations,
# and some make less room for a few rows than for many.
_FEW, _MANY = (4, 32), 1024
# No search goes beyond.
_MOST = 1 << 20
# Of all planners: what one has seen serves the others.
_REPEATS = Repeats()
# Backbones that are known to take images of a size, by their settings.
_TAKES: set[str] = set()


class Planner:
    """Plans of one job, for any batch size, without allocating its model.

    Args:
        job: What is run.

    Raises:
        UserError: The backbone or the adapter cannot be made as the job says.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._traces: dict[int, Trace] = {}
        # The smallest batch size that a step is computed for.
        self._few = _FEW[0]

    def plan(self, batch_size: int) -> Plan:
        """The plan for a batch size of at least 1, from running the step on fake tensors."""
        return self._trace(batch_size).plan(batch_size)

    def plans(self, batch_sizes: Sequence[int]) -> list[Plan]:
        """Plans for several batch sizes: as `plan` gives them, but only few steps are run."""
        return [self._at(size) for size in batch_sizes]

    def largest_batch(self, budget: int) -> int:
        """The largest batch size whose peak is at most `budget` bytes; 0 if not even one image fits.

        Exact with respect to `plan`: the batch found fits, and the next one does not.
        """
        low = self._affine.largest_batch(budget, _MOST) if self._affine else _FEW[0]
        if self._affine and self._few <= low < _MANY:
            return low
        if low < 1 or not self._fits(low, budget):
            high, low = max(low, 1), 0
        elif low >= _MOST or not self._fits(low + 1, budget):
            return low
        else:
            high = 2 * low
            while high < _MOST and self._fits(high, budget):
                low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(middle, budget):
                low = middle
            else:
                high = middle
        return low

    def likely_largest_batch(self, budget: int) -> int:
        """What `largest_batch` gives as a rule, from the steps that `plans` runs too."""
        return self._affine.largest_batch(budget, _MOST) if self._affine else self.largest_batch(budget)

    def _at(self, batch_size: int) -> Plan:
        if _FEW[0] < batch_size < _MANY and batch_size not in self._traces and self._affine and self._few <= batch_size:
            return self._affine.at(batch_size).plan(batch_size)
        return self.plan(batch_size)

    def _fits(self, batch_size: int, budget: int) -> bool:
        return self.plan(batch_size).peak <= budget

    @cached_property
    def _affine(self) -> "AffineTrace | None":
        for self._few in _FEW:
            affine = AffineTrace.through({size: self._trace(size) for size in (self._few, _MANY)})
            if affine is not None:
                return affine
        return None

    @cached_property
    def _subject(self) -> "_Subject":
        return _Subject(self.job, self._fake)

    def _trace(self, batch_size: int) -> "Trace":
        if batch_size not in self._traces:
            self._traces[batch_size] = self._subject.trace(batch_size)
        return self._traces[batch_size]


def measure(job: Job, batch_size: int) -> Plan:
    """What `Planner.plan` plans, counted on a step that is really run, on the CPU and with random weights."""
    return _Subject(job, None).trace(batch_size).plan(batch_size)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str | int) -> int:
    """Bytes from `8GiB`, `500 MB` or `123456`: KiB, MiB, GiB are powers of 1024, KB, MB, GB powers of 1000.

    Raises:
        UserError: The text is no such size, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS:
        raise UserError(f"{text!r} is no size; write bytes, or a number with KiB, MiB, GiB, KB, MB or GB, such as 8GiB")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size < 1:
        raise UserError(f"a size must be above zero, not {text!r}")
    return size


class _Subject:
    """A job's model and optimizer between two steps, on fake tensors or, with no fake mode, on real ones."""

    def __init__(self, job: Job, fake: FakeTensorMode | None) -> None:
        self.job = job
        self._fake = fake
        self._mode: AbstractContextManager = nullcontext() if fake is None else fake
        channels, *own = data_config(job.backbone)["input_size"]
        height, width = own if job.image_size is None else sides(job.image_size)
        self._shape = (channels, height, width)
        with torch.random.fork_rng(devices=[]):
            with nullcontext() if fake is None else _Unallocated(fake):
                model = create_backbone(
                    job.backbone, job.num_classes, pretrained=False, image_size=job.image_size, **job.backbone_args
                )
            if fake is not None:
                _make_fake(model, fake)
            takes = f"{job.backbone} {job.backbone_args} {height} {width}"
            with self._mode:
                if job.image_size is not None and takes not in _TAKES:
                    require_image_size(job.backbone, model, job.image_size)
                    _TAKES.add(takes)
                self.model = adapt(model, job)
                self._trained = [p for p in self.model.parameters() if p.requires_grad]
                self.optimizer = job.optimizer(self._trained)
        cut = Cut(self.model)
        self._cut = cut if fake is not None and cut.leaves_out else None
        # What the optimizer's step makes and frees.
        self._passing: list[tuple[int, int]] | None = None

    def trace(self, batch_size: int) -> Trace:
        """Run one step and record it. It starts with the gradients and the state that another step left."""
        # The collector would free what lies in reference cycles at arbitrary times.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with self._mode, torch.random.fork_rng(devices=[]):
                if self._fake is None:
                    self._record(batch_size)
                    trace = self._record(batch_size)
                    assert trace is not None
                    return trace
                self._pretend_a_step()
                trace = self._record(batch_size)
                if trace is None:
                    # Not to be told from a part of it.
                    self._cut = None
                    return self.trace(batch_size)
                if len(self._gradients()) < len(self._trained):
                    # Something trained takes no part in the loss.
                    self._trained = [p for p in self._trained if p.grad is not None]
                    self.optimizer.state.clear()
                    self._passing = None
                    return self.trace(batch_size)
                return trace
        finally:
            if collecting:
                gc.enable()

    def _pretend_a_step(self) -> None:
        """Make the gradients and the state that a step leaves, without running its forward and backward."""
        assert self._fake is not None
        for parameter in self._trained:
            # What `empty_like` gives, without asking for it as an operation.
            with no_dispatch():
                bare = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
            parameter.grad = FakeTensor(self._fake, bare, parameter.device)
        if not self.optimizer.state:
            self.optimizer.step()

    def _step(self, recorder: Recorder) -> None:
        """The optimizer's step. The batch is nothing to it: on fake tensors it is run once, and then repeated."""
        if self._passing is not None:
            recorder.repeat(self._passing)
            return
        mark = recorder.mark()
        self.optimizer.step()
        if self._fake is not None:
            self._passing = recorder.passing(mark)

    def _record(self, batch_size: int) -> Trace | None:
        whole = WHOLE.get(self.job.precision, torch.float32)
        images = torch.zeros(batch_size, *self._shape, dtype=whole)
        labels = torch.zeros(batch_size, dtype=torch.long)
        recorder = Recorder()
        recorder.add_as("weights", [*self.model.parameters(), *self.model.buffers()])
        recorder.add_as("gradients", self._gradients())
        recorder.add_as("optimizer", self._state())
        recorder.add_as("images", [images, labels])
        cut = self._cut
        with (
            recorder,
            nullcontext() if self._fake is None else _REPEATS.booked(recorder),
            nullcontext() if cut is None else cut.applied(recorder),
        ):
            # The loss scaling of fp16 makes no tensor of any size.
            with forward_context(self.job.precision):
                loss = F.cross_entropy(self.model(images), labels)
            recorder.end("forward")
            recorder.classify("activations")
            self.optimizer.zero_grad()
            loss.backward()
            if cut is not None:
                cut.fill_gradients(recorder)
            recorder.end("backward")
            recorder.classify("gradients", self._gradients())
            self._step(recorder)
            recorder.end("step")
            recorder.classify("optimizer", self._state())
        return recorder.trace() if cut is None else cut.whole(recorder.trace())

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _state(self) -> list[Tensor]:
        return [value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


class _Unallocated(TorchDispatchMode):
    """While a model is built: large tensors are fake, small ones real, since constructors read some of them."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on tensors as they are; what makes a tensor from nothing is tried out on a fake one."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return read_number(args[0])
        if any(isinstance(argument, Tensor) for argument in args):
            return func(*args, **kwargs)
        with self._fake:
            result = func(*args, **kwargs)
        small = isinstance(result, Tensor) and result.numel() <= _SMALL and result.device.type == "cpu"
        return func(*args, **kwargs) if small else result


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Replace the parameters and buffers of a model that are real."""
    replaced: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    if id(tensor) not in replaced:
                        replaced[id(tensor)] = fake.from_tensor(tensor)
                    tensors[name] = replaced[id(tensor)]  # type: ignore[assignment]
