"""What a step does to memory, written down event by event: (storage, +bytes), (storage, -bytes), ...

Two traces of the same step at different batch sizes make and free the same storages in the same order, as a rule. Then
each storage's size is affine in the batch size, and the step is known at every other batch size without running it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from snell_lightning.memory.tracker import StorageTracker

KINDS = ("weights", "gradients", "optimizer", "images", "activations", "temporaries")
PHASES = ("forward", "backward", "step")


@dataclass(frozen=True)
class Plan:
    """The memory of one training step, in bytes.

    Attributes:
        batch_size: Images in the batch.
        weights: Parameters and buffers.
        gradients: All gradients, as they stand when backward is over.
        optimizer: The optimizer's state.
        images: The batch, with its labels.
        activations: What the end of forward leaves to backward, apart from the above.
        temporaries: At the peak, what is none of the above. Gradients of activations count here, and so does what
            backward recomputes.
        peak: Most that lives at a time. Less than the sum of the above where not all of it lives then.
        forward: Most that lives at a time during forward.
        backward: The same during backward.
        step: The same during the optimizer's step.
        at_peak: What lives at the peak, by the names above; adds up to `peak`.
    """

    batch_size: int
    weights: int
    gradients: int
    optimizer: int
    images: int
    activations: int
    temporaries: int
    peak: int
    forward: int
    backward: int
    step: int
    at_peak: Mapping[str, int]


def read_number(tensor: Tensor) -> bool | int | float:
    """What `tensor.item()` gives; of a tensor without data, False or 1."""
    try:
        return torch.ops.aten._local_scalar_dense.default(tensor)
    except DataDependentOutputException:
        return False if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1


# Operations that change nothing but the numbers of their first tensor, as optimizers use them; without numbers there is
# nothing to do. A single number is kept up to date: fake tensors know those that were given.
_OVERWRITING = frozenset(
    {
        torch.ops.aten.add_.Tensor,
        torch.ops.aten.addcdiv_.default,
        torch.ops.aten.addcmul_.default,
        torch.ops.aten.copy_.default,
        torch.ops.aten.div_.Tensor,
        torch.ops.aten.lerp_.Scalar,
        torch.ops.aten.mul_.Tensor,
        torch.ops.aten.sub_.Tensor,
    }
)


class Recorder(StorageTracker):
    """A tracker that writes down every storage's coming and going, and of what kind each storage is."""

    def __init__(self) -> None:
        super().__init__()
        self._serials: dict[int, int] = {}
        self._kinds: list[str] = []
        self._owners: list[int] = []
        self._deltas: list[int] = []
        self._ends: list[int] = []

    def add_as(self, kind: str, tensors: Sequence[Tensor]) -> None:
        """Count tensors that live already."""
        for tensor in tensors:
            self.add(tensor)
        self.classify(kind, tensors)

    def classify(self, kind: str, tensors: Sequence[Tensor] | None = None) -> None:
        """Say of what kind tensors are, or all that live now, unless it has been said."""
        keys = list(self._serials) if tensors is None else [t.untyped_storage()._cdata for t in tensors]
        for key in keys:
            serial = self._serials[key]
            if self._kinds[serial] == "temporaries":
                self._kinds[serial] = kind

    @property
    def deltas(self) -> Sequence[int]:
        """The changes so far."""
        return self._deltas

    def serial(self, tensor: Tensor) -> int:
        """The number of a tensor's storage."""
        return self._serials[tensor.untyped_storage()._cdata]

    def mark(self) -> tuple[int, int]:
        """A point to go back to with `forget`."""
        return len(self._deltas), len(self._kinds)

    def forget(self, mark: tuple[int, int]) -> int | None:
        """Forget what happened since a mark, if nothing that was made since then lives and nothing older died.

        Returns:
            The most bytes that lived since then, beyond those that lived then; None where nothing was forgotten.
        """
        events, storages = mark
        extra = live = 0
        for delta in self._deltas[events:]:
            live += delta
            extra = max(extra, live)
        if live != 0 or any(serial >= storages for serial in self._serials.values()):
            return None
        del self._owners[events:], self._deltas[events:], self._kinds[storages:]
        return extra

    def passing(self, mark: tuple[int, int]) -> list[tuple[int, int]] | None:
        """What happened since a mark, by number of the storage since then; None where it made or freed what stays."""
        events, storages = mark
        owners = self._owners[events:]
        if any(owner < storages for owner in owners) or any(serial >= storages for serial in self._serials.values()):
            return None
        return [(owner - storages, delta) for owner, delta in zip(owners, self._deltas[events:], strict=True)]

    def repeat(self, events: Sequence[tuple[int, int]]) -> None:
        """Write down once more what `passing` told."""
        storages = len(self._kinds)
        self._kinds += ["temporaries"] * (1 + max((number for number, _ in events), default=-1))
        for number, delta in events:
            self._owners.append(storages + number)
            self._deltas.append(delta)

    def book(self, size: int) -> None:
        """Count so many bytes as made and freed."""
        self._change(-1, size)
        self._change(-1, -size)

    def end(self, phase: str) -> None:
        """A phase ends here and the next one begins; phases come in the order of `PHASES`."""
        assert phase == PHASES[len(self._ends)]
        self._ends.append(len(self._owners))

    def trace(self) -> "Trace":
        """What was written down."""
        kinds = np.array([KINDS.index(kind) for kind in self._kinds])
        owners = np.array(self._owners)
        end = self._ends[-1]
        return Trace(owners[:end], np.array(self._deltas, dtype=np.int64)[:end], kinds, tuple(self._ends))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation; on a tensor without data, as little of it as counts."""
        if args and isinstance(args[0], FakeTensor):
            if func is torch.ops.prim.device.default:
                return args[0].fake_device
            if func in _OVERWRITING and args[0].numel() > 1:
                return args[0]
            if func is torch.ops.aten._local_scalar_dense.default:
                return read_number(args[0])
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _change(self, key: int, delta: int) -> None:
        super()._change(key, delta)
        if key not in self._serials:
            self._serials[key] = len(self._kinds)
            self._kinds.append("temporaries")
        self._owners.append(self._serials[key])
        self._deltas.append(delta)
        if delta <= 0 and key not in self._sizes:
            del self._serials[key]


@dataclass(frozen=True)
class Trace:
    """A recorded step: by event which storage (`owners`) changed by how many bytes (`deltas`).

    Attributes:
        owners: Number of the storage, by event.
        deltas: Change of its size in bytes, by event.
        kinds: Index into `KINDS`, by storage.
        ends: Number of events up to the end of each phase.
    """

    owners: np.ndarray
    deltas: np.ndarray
    kinds: np.ndarray
    ends: tuple[int, ...]

    def plan(self, batch_size: int) -> Plan:
        """The step's figures."""
        live = np.cumsum(self.deltas)
        forward, backward, step = self.ends
        at_peak = self._alive(int(np.argmax(live)) + 1)
        return Plan(
            batch_size=batch_size,
            weights=self._alive(step)["weights"],
            gradients=self._alive(backward)["gradients"],
            optimizer=self._alive(step)["optimizer"],
            images=self._alive(forward)["images"],
            activations=self._alive(forward)["activations"],
            temporaries=at_peak["temporaries"],
            peak=int(live.max()),
            forward=int(live[:forward].max()),
            backward=int(live[forward - 1 : backward].max()),
            step=int(live[backward - 1 : step].max()),
            at_peak=at_peak,
        )

    def _alive(self, events: int) -> dict[str, int]:
        """Bytes alive after so many events, by kind."""
        sums = np.zeros(len(KINDS), dtype=np.int64)
        np.add.at(sums, self.kinds[self.owners[:events]], self.deltas[:events])
        return {kind: int(size) for kind, size in zip(KINDS, sums, strict=True)}


@dataclass(frozen=True)
class AffineTrace:
    """A step whose every event is `constant + slope * batch size` bytes."""

    trace: Trace
    constants: np.ndarray
    slopes: np.ndarray

    @classmethod
    def through(cls, traces: Mapping[int, Trace]) -> "AffineTrace | None":
        """The one through two traces, by batch size; None where these do not make and free the same storages."""
        (few, first), (many, second) = traces.items()
        same = first.ends == second.ends and all(
            np.array_equal(getattr(first, name), getattr(second, name)) for name in ("owners", "kinds")
        )
        if not same:
            return None
        slopes, rest = np.divmod(second.deltas - first.deltas, many - few)
        return None if rest.any() else cls(first, first.deltas - few * slopes, slopes)

    def at(self, batch_size: int) -> Trace:
        """The trace at a batch size."""
        return replace(self.trace, deltas=self.constants + batch_size * self.slopes)

    def largest_batch(self, budget: int, most: int) -> int:
        """The largest batch size, up to `most`, at which no more than `budget` bytes live at a time."""
        constants, slopes = np.cumsum(self.constants), np.cumsum(self.slopes)
        if (constants[slopes == 0] > budget).any():
            return 0
        growing = slopes > 0
        return max(0, int(np.min((budget - constants[growing]) // slopes[growing], initial=most)))
