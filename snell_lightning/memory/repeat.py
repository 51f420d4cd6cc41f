"""Plan faster: what a tuned layer does to make its update is done once for each shape, and then only booked.

A backbone of forty blocks makes updates of the same few shapes hundreds of times, each in many tiles. Memory does not
depend on the numbers, so on fake tensors one time tells all: the most that lived during the call, and what it returned.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from snell_lightning.adapters.update.noise import Noise
from snell_lightning.adapters.update.rule import UpdateRule
from snell_lightning.memory.trace import Recorder

# Methods that return new tensors, or None, each with a storage of its own.
_METHODS = ("write", "backward", "sampled_backward")


class Repeats:
    """Calls of `UpdateRule` that were seen, by the shapes they were made with."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[int, Callable[[], Any]]] = {}

    @contextmanager
    def booked(self, recorder: Recorder) -> Iterator[None]:
        """Within, calls that were seen before make what they return and book what they would have held meanwhile."""
        originals = {name: getattr(UpdateRule, name) for name in _METHODS}
        row_ranges = Noise.row_ranges
        for name, original in originals.items():
            setattr(UpdateRule, name, self._book(name, original, recorder))
        Noise.row_ranges = _all_dropped  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(UpdateRule, name, original)
            Noise.row_ranges = row_ranges  # type: ignore[method-assign]

    def _book(self, name: str, original: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
        def method(rule: UpdateRule, *args: Any, **kwargs: Any) -> Any:
            key = (name, rule, _signature(args), _signature(kwargs))
            if key not in self._seen:
                mark = recorder.mark()
                make = _maker(original(rule, *args, **kwargs))
                extra = recorder.forget(mark)
                if extra is None:
                    # Something else was made that lives on; the next time it may be there already.
                    return original(rule, *args, **kwargs)
                self._seen[key] = extra, make
            extra, make = self._seen[key]
            recorder.book(extra)
            return make()

        return method


def _all_dropped(noise: Noise, rows: int, samples: int) -> tuple[list[slice], list[slice]]:
    """The worst case of drop path. To draw is to read numbers, one by one, of tensors that have none."""
    return ([], [slice(0, rows)]) if noise.drop_path and samples else ([slice(0, rows)], [])


def _signature(values: Any) -> Any:
    """Arguments as far as memory goes, to be looked up by."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    return tuple(
        (name, (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else repr(value))
        for name, value in items
    )


def _maker(result: Any) -> Callable[[], Any]:
    """A function that makes the same again, of tensors without data."""

    def template(tensor: Tensor) -> Callable[[], Tensor]:
        shape, stride, dtype, device = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
        return lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device)

    templates = tree_map_only(Tensor, template, result)
    return lambda: tree_map_only(_Function, lambda make: make(), templates)


_Function = type(lambda: None)
