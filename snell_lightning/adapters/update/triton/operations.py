"""The programs of this folder as operations of torch, so that tensors without data, modes that count and compilers see
what is read and written.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from snell_lightning.adapters.update.triton.backward import backward
from snell_lightning.adapters.update.triton.dropped import dropped
from snell_lightning.adapters.update.triton.entries import SPARSIFIERS
from snell_lightning.adapters.update.triton.table import make_table, where
from snell_lightning.adapters.update.triton.thresholds import thresholds
from snell_lightning.adapters.update.triton.write import write

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_FACTORS = "Tensor[] p, Tensor[] q, str kernel, str sparsifier, float[] scales"
_OPERATIONS = {
    "thresholds": "(Tensor[] p, Tensor[] q, str kernel, float[] scales, int[] ranks) -> Tensor",
    "write_all": f"({_FACTORS}, Tensor? taus, Tensor(a!) out, Tensor? base, Tensor? order, float factor,"
    " Tensor? seed=None, int? number=None) -> ()",
    "backward_all": f"({_FACTORS}, Tensor? taus, Tensor(a!) grad, Tensor? base, Tensor? order, float factor,"
    " bool rewrite) -> Tensor",
    "dropped": "(Tensor(a!) mask, Tensor? seed, int? number, int samples, float dropout, float drop_path) -> ()",
}


def _thresholds(
    p: Sequence[Tensor], q: Sequence[Tensor], kernel: str, scales: Sequence[float], ranks: Sequence[int]
) -> Tensor:
    device = p[0].device
    with _on(device):
        numbers = _numbers(tuple(scales), torch.float32, device), _numbers(tuple(ranks), torch.int32, device)
        table = make_table(where(p, q), device)
        return thresholds(table, *numbers, len(p[0]), kernel == "distance", _TYPES[p[0].dtype])


def _write(
    p: Sequence[Tensor],
    q: Sequence[Tensor],
    kernel: str,
    sparsifier: str,
    scales: Sequence[float],
    taus: Tensor | None,
    out: Tensor,
    base: Tensor | None,
    order: Tensor | None,
    factor: float,
    seed: Tensor | None = None,
    number: int | None = None,
) -> None:
    kind = len(p[0]), kernel == "distance", SPARSIFIERS[sparsifier], _TYPES[p[0].dtype]
    with _on(out.device):
        numbers = _numbers(tuple(scales), torch.float32, out.device)
        table = make_table(where(p, q), out.device)
        write(table, taus, out, base, order, numbers, factor, *kind, number if seed is None else seed)


def _backward(
    p: Sequence[Tensor],
    q: Sequence[Tensor],
    kernel: str,
    sparsifier: str,
    scales: Sequence[float],
    taus: Tensor | None,
    grad: Tensor,
    base: Tensor | None,
    order: Tensor | None,
    factor: float,
    rewrite: bool,
) -> Tensor:
    grads = _grads(p, q)
    kind = len(p[0]), kernel == "distance", SPARSIFIERS[sparsifier], _TYPES[p[0].dtype]
    with _on(grad.device):
        numbers = _numbers(tuple(scales), torch.float32, grad.device)
        table = make_table(where(p, q), grad.device)
        backward(table, taus, grad, base, order, numbers, factor, rewrite, *kind, grads)
    return grads


def _dropped(
    mask: Tensor, seed: Tensor | None, number: int | None, samples: int, dropout: float, drop_path: float
) -> None:
    key = number if seed is None else seed
    assert key is not None
    with _on(mask.device):
        dropped(mask, key, samples, dropout, drop_path)


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Within, launches go to this device: Triton launches on the current one, wherever the tensors are."""
    return nullcontext() if device.index is None else torch.get_device_module(device).device(device)


def _grads(p: Sequence[Tensor], q: Sequence[Tensor]) -> Tensor:
    return p[0].new_empty(sum(factor.numel() for factor in (*p, *q)))


@lru_cache(maxsize=256)
def _numbers(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on the device; the same tensor for the same numbers."""
    return torch.tensor(values, dtype=dtype, device=device)


def attempt(device: torch.device) -> None:
    """Run each program once, on an update of one entry.

    Raises:
        Exception: Whatever Triton raises where it cannot.
    """
    p, q = torch.zeros(2, 1, 1, device=device), torch.ones(2, 1, 1, device=device)
    settings = [p], [q], "distance", "hard", [1.0]
    taus = torch.ops.snell.thresholds([p], [q], "distance", [1.0], [1])
    matrix = torch.zeros(1, 1, device=device)
    torch.ops.snell.write_all(*settings, taus, matrix, None, None, 1.0)
    torch.ops.snell.backward_all(*settings, taus, matrix, None, None, 1.0, True)


_operations = torch.library.Library("snell", "FRAGMENT")
_without_data = {
    "thresholds": lambda p, *_: p[0].new_empty(len(p), dtype=torch.float32),
    "write_all": lambda *_: None,
    "backward_all": lambda p, q, *_: _grads(p, q),
    "dropped": lambda *_: None,
}
for _name, _function in {
    "thresholds": _thresholds,
    "write_all": _write,
    "backward_all": _backward,
    "dropped": _dropped,
}.items():
    _operations.define(f"{_name}{_OPERATIONS[_name]}")
    _operations.impl(_name, _function, "CompositeExplicitAutograd")
    _operations.impl(_name, _without_data[_name], "Meta")
