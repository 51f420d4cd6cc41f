"""Count the memory that tensors take, exactly and by phase: of tensors with data and of fake ones alike."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Phase:
    """What was counted between the start and the end of a part of the work; in bytes, the most over its repetitions."""

    peak: int
    live_after: int


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of every live torch storage, exactly: each once, from the op that made it until it is freed.

    Views share their base's storage and in-place operations make none, so neither counts again. What autograd alone
    keeps counts, as does what its backward makes. What an operation allocates and frees within itself, such as a
    convolution's workspace, is not seen, and neither are the rounding and the caches of an allocator.

        tracker = StorageTracker(model, images)
        with tracker:
            with tracker.phase("forward"):
                loss = model(images).sum()
        tracker.phases["forward"].peak

    A storage made outside the tracker, or by something other than an operation (`torch.from_numpy`, say), counts from
    the first operation that returns a tensor on it, so name what lives already. Not for several threads at a time;
    autograd's own threads are fine.

    Args:
        known: Tensors, and modules with their parameters, gradients and buffers, that live when counting starts.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes alive since construction or `reset_peak`.
        phases: What was counted in each `phase`, by name.
    """

    def __init__(self, *known: Tensor | nn.Module) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.phases: dict[str, Phase] = {}
        # The most since the innermost phase was entered.
        self._window = 0
        # By the address of the C++ storage. A weak reference to the Python object of a storage stays valid while the
        # C++ storage lives: torch keeps one with the other.
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}
        self._resize: Callable[..., Any] | None = None
        for item in known:
            self.add(item)

    def add(self, item: Tensor | nn.Module) -> None:
        """Count what lives already: a tensor, or a module's parameters, their gradients and the buffers."""
        if isinstance(item, Tensor):
            self._see(item)
            return
        for parameter in item.parameters():
            self._see(parameter)
            if parameter.grad is not None:
                self._see(parameter.grad)
        for buffer in item.buffers():
            self._see(buffer)

    def reset_peak(self) -> None:
        """Forget the peak: from here on it is the most alive from now."""
        self.peak = self.live

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record in `phases[name]` the most that lives within, and what lives at the end. Phases may nest."""
        outer, self._window = self._window, self.live
        try:
            yield
        finally:
            before = self.phases.get(name, Phase(0, 0))
            self.phases[name] = Phase(max(before.peak, self._window), max(before.live_after, self.live))
            self._window = max(outer, self._window)

    def __enter__(self) -> "StorageTracker":
        """Start to count."""
        super().__enter__()
        self._resize = original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self._sizes:
                self._see_storage(storage)
            return result

        # Called on a storage, it is no operation.
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stop counting what is made; what is freed still counts."""
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign, assignment]
        super().__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._see(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                if isinstance(item, Tensor):
                    self._see(item)
                elif isinstance(item, (tuple, list)):
                    for inner in item:
                        if isinstance(inner, Tensor):
                            self._see(inner)
        return result

    def _see(self, tensor: Tensor) -> None:
        """Count a tensor's storage if it is new or has another size than before."""
        if tensor.layout is torch.strided:
            self._see_storage(tensor.untyped_storage())

    def _see_storage(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known == size:
            return
        if known is None:
            self._references[key] = weakref.ref(storage, lambda _: self._freed(key))
            known = 0
        self._sizes[key] = size
        self._change(key, size - known)

    def _freed(self, key: int) -> None:
        del self._references[key]
        self._change(key, -self._sizes.pop(key))

    def _change(self, key: int, delta: int) -> None:
        """Book `delta` bytes on the storage at address `key`."""
        self.live += delta
        if self.live > self.peak:
            self.peak = self.live
        if self.live > self._window:
            self._window = self.live
