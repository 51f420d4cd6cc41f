"""Thresholds of a whole model's updates on a GPU, found at once and kept until a factor changes.

So the micro-batches of an accumulation, what runs again in backward, and the batches of an evaluation share them. A
change is noticed by the version that torch counts for each tensor, by an optimizer's step, and by a change between
training and evaluation, around which weights are exchanged in ways that no version counts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from snell_lightning.adapters.update import triton
from snell_lightning.adapters.update.delta import SnellDelta
from snell_lightning.adapters.update.rule import UpdateRule
from snell_lightning.adapters.update.stack import thresholds


class Layer(Protocol):
    """What has updates that are made together."""

    @property
    def updates(self) -> list[SnellDelta]:
        """The updates."""


class SharedThresholds:
    """The thresholds of all layers that ask."""

    def __init__(self) -> None:
        # By layer: what its thresholds were found from, and these; None where none are known.
        self._known: WeakKeyDictionary[Any, tuple[Any, Tensor] | None] = WeakKeyDictionary()

    def of(self, layer: Layer) -> Tensor | None:
        """The thresholds of a layer's updates, `(updates,)`; None where they are not made together, or dense."""
        state = _state(layer.updates)
        if state is None:
            return None
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # They must be found each time that the graph is run.
            return self._find([layer])[0]
        known = self._known.get(layer)
        if known is None or known[0] != state:
            self._known[layer] = None
            stale = [(each, now) for each in list(self._known) if (now := self._stale(each, state))]
            for (each, now), taus in zip(stale, self._find([each for each, _ in stale]), strict=True):
                self._known[each] = now, taus
            known = self._known[layer]
        assert known is not None
        return known[1]

    def forget(self, layer: Layer) -> None:
        """Find a layer's thresholds anew when they are needed next."""
        if layer in self._known:
            self._known[layer] = None

    def _stale(self, layer: Layer, like: "_State") -> "_State | None":
        """What a layer's thresholds are to be found from, together with others; None where that need not be."""
        now, known = _state(layer.updates), self._known[layer]
        if now is None or now.alike != like.alike or (known is not None and known[0] == now):
            return None
        return now

    @staticmethod
    def _find(layers: Sequence[Layer]) -> list[Tensor]:
        """The thresholds of these layers."""
        updates = [update for layer in layers for update in layer.updates]
        factors = [factor.detach() for update in updates for factor in (update.out_factors, update.in_factors)]
        taus = thresholds([update.rule for update in updates], factors)
        return list(taus.split([len(layer.updates) for layer in layers]))

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedThresholds":
        """One for the copy's layers, which it gets to know when they ask."""
        return SharedThresholds()

    def __reduce__(self) -> Any:
        return SharedThresholds, ()


# Layers that there are, and those by the address of their first factor.
_layers: WeakSet[Any] = WeakSet()
_by_address: WeakValueDictionary[int, Any] = WeakValueDictionary()


def know(layer: Layer) -> None:
    """Let a layer be found by its factors."""
    _layers.add(layer)


def known_thresholds(rules: Sequence[UpdateRule], factors: Sequence[Tensor]) -> Tensor | None:
    """The thresholds of the layer that has these factors, `(updates,)`, as its model shares them.

    None where no layer has them, where they are not made together, or where they are dense.

    Args:
        rules: How the layer's updates are made.
        factors: P and Q of each in turn.
    """
    if rules[0].kernel not in triton.KERNELS or not triton.applies(*factors):
        return None
    address = factors[0].data_ptr()
    layer = _by_address.get(address)
    if layer is None or layer.updates[0].out_factors.data_ptr() != address:
        _by_address.update({each.updates[0].out_factors.data_ptr(): each for each in _layers})
        layer = _by_address.get(address)
    if layer is None or [update.rule for update in layer.updates] != list(rules):
        return None
    return layer.thresholds.of(layer)


# How often an optimizer has stepped.
_steps = 0


def _count_step(optimizer: Optimizer, arguments: Any, options: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class _State(NamedTuple):
    """What thresholds depend on, equal where they are the same; `alike` is equal where they are found together."""

    alike: Any
    steps: int
    tensors: tuple[Any, ...]
    settings: tuple[tuple[float, float], ...]


def _state(updates: Sequence[SnellDelta]) -> _State | None:
    """The state of a layer's updates; None where they are not made together on a GPU, or dense."""
    factors = [factor for update in updates for factor in (update.out_factors, update.in_factors)]
    rules = [update.rule for update in updates]
    if any(rule.dense for rule in rules) or rules[0].kernel not in triton.KERNELS or not triton.applies(*factors):
        return None
    first = factors[0]
    alike = rules[0].kernel, len(first), first.dtype, first.device, torch.is_inference_mode_enabled()
    return _State(alike, _steps, tuple(map(_version, factors)), tuple((rule.scale, rule.sparsity) for rule in rules))


def _version(tensor: Tensor) -> Any:
    """Equal where a tensor is the same, and has the same values."""
    if tensor.is_inference():  # Changes are not counted: what was known never holds.
        return object()
    return 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr(), tensor._version
