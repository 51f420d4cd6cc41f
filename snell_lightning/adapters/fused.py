"""Elementwise work on tiles, twice: as steps in place, and as one expression that torch's compiler fuses into one loop.

On the CPU a large tile takes the fused loop: each number is read once and written once. It needs a C++ compiler on the
machine, and is compiled at first use (some 20 s, then cached on disk); where that fails, and on small tiles, which
would not repay it, the steps are taken. On accelerators the steps are taken as well: fusing has not been measured
there. `SNELL_FUSED=0` in the environment switches fusing off.

The two agree to the rounding of single operations (1e-6), not bit for bit.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

# Tiles below this number of entries are not worth a compilation.
_LARGE = 2**18
_LOG = logging.getLogger(__name__)


class Tilewise:
    """An operation on tiles in two forms of the same signature, whose first argument is a tile.

    Args:
        steps: Works in place, operation by operation.
        expression: What torch's compiler fuses.
    """

    failed = os.environ.get("SNELL_FUSED") == "0"

    def __init__(self, steps: Callable[..., Any], expression: Callable[..., Any]) -> None:
        self.steps, self.expression = steps, expression
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, tile: Tensor, *arguments: Any) -> Any:
        """Do it, in the form that is faster here."""
        fuse = tile.device.type == "cpu" and tile.numel() >= _LARGE and not isinstance(tile, FakeTensor)
        if not fuse or Tilewise.failed:
            return self.steps(tile, *arguments)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self.expression, dynamic=True)
            return self._compiled(tile, *arguments)
        except Exception as error:
            # Whatever is wrong with a machine's compiler, the steps are right too. Nothing has been written yet: the
            # compiler fails before its product runs.
            Tilewise.failed = True
            _LOG.info("elementwise work is not fused: %s", str(error).strip().splitlines()[0])
            return self.steps(tile, *arguments)


def values_of(winners: Tensor, tau: Tensor, sparsifier: str) -> Tensor:
    """The update's entries, for winners of the competition beside zeros."""
    if sparsifier == "magnitude":
        return winners * winners.abs()
    if sparsifier == "soft":
        return winners * (winners.abs() - tau)
    return winners


def slopes(winners: Tensor, tau: Tensor, sparsifier: str) -> Tensor:
    """What the update's gradient is multiplied with to become the matrix's, for winners beside zeros."""
    if sparsifier == "magnitude":
        return winners.abs()
    alive = winners.sign().abs()
    return 2 * winners.abs() - tau * alive if sparsifier == "soft" else alive


def _survive(matrix: Tensor, tau: Tensor) -> Tensor:
    # A NaN survives, so that it is seen.
    return torch.where(matrix.abs() <= tau, 0.0, matrix)


def shrink_(matrix: Tensor, tau: Tensor) -> Tensor:
    """Set the entries that are not above the threshold by absolute value to zero, in place."""
    if matrix.device.type == "cpu" and not isinstance(tau, FakeTensor):
        return torch.hardshrink(matrix, tau.item(), out=matrix)
    return matrix.masked_fill_(matrix.abs() <= tau, 0.0)


def _differ_in_steps(out: Tensor, squares: list[Tensor]) -> None:
    for distances in squares:
        distances.clamp_min_(0).sqrt_()
    out.copy_(squares[0])
    for piece, distances in enumerate(squares[1:], start=1):
        out.add_(distances, alpha=(-1) ** piece)


def _differ(out: Tensor, squares: list[Tensor]) -> None:
    total = squares[0].clamp_min(0).sqrt()
    for piece, square in enumerate(squares[1:], start=1):
        total = total + (-1) ** piece * square.clamp_min(0).sqrt()
    out.copy_(total)


differ = Tilewise(_differ_in_steps, _differ)
"""`differ(out, squares)`: the roots of squared distances, summed with alternating sign, to `out`; squares are lost."""


def _finish_in_steps(tile: Tensor, base: Tensor | None, tau: Tensor | None, factor: float, sparsifier: str) -> None:
    if tau is not None:
        shrink_(tile, tau)
        if sparsifier in ("magnitude", "soft"):
            sizes = tile.abs()
            tile.mul_(sizes if sparsifier == "magnitude" else sizes.sub_(tau))
    if base is None:
        tile.mul_(factor)
    else:
        torch.add(base.to(tile.dtype), tile, alpha=factor, out=tile)


def _finish(tile: Tensor, base: Tensor | None, tau: Tensor | None, factor: float, sparsifier: str) -> None:
    values = tile if tau is None else values_of(_survive(tile, tau), tau, sparsifier)
    tile.copy_(factor * values if base is None else base.to(tile.dtype) + factor * values)


finish = Tilewise(_finish_in_steps, _finish)
"""`finish(tile, base, tau, factor, sparsifier)`: a tile of K becomes `base + factor * update`, in place."""


def _turn_in_steps(
    grad: Tensor,
    squares: list[Tensor],
    base: Tensor | None,
    tau: Tensor | None,
    factor: float,
    sparsifier: str,
    rewrite: bool,
) -> None:
    tile = torch.empty_like(squares[0])
    _differ_in_steps(tile, squares)
    if tau is None:
        weights = grad.to(tile.dtype)
    else:
        weights = slopes(shrink_(tile, tau), tau, sparsifier).mul_(grad)
    for distances in squares:
        # 1 / 0 counts 0; a NaN stays one.
        distances.reciprocal_().nan_to_num_(nan=torch.nan, posinf=0.0, neginf=0.0).mul_(weights)
    if rewrite:
        if tau is not None and sparsifier in ("magnitude", "soft"):
            sizes = torch.abs(tile, out=weights)
            tile.mul_(sizes if sparsifier == "magnitude" else sizes.sub_(tau))
        grad.copy_(tile.mul_(factor) if base is None else torch.add(base, tile, alpha=factor))


def _turn(
    grad: Tensor,
    squares: list[Tensor],
    base: Tensor | None,
    tau: Tensor | None,
    factor: float,
    sparsifier: str,
    rewrite: bool,
) -> None:
    distances = [square.clamp_min(0).sqrt() for square in squares]
    matrix = distances[0]
    for piece, distance in enumerate(distances[1:], start=1):
        matrix = matrix + (-1) ** piece * distance
    winners = matrix if tau is None else _survive(matrix, tau)
    weights = grad.to(matrix.dtype)
    if tau is not None:
        weights = weights * slopes(winners, tau, sparsifier)
    for square, distance in zip(squares, distances, strict=True):
        square.copy_(torch.where(distance == 0, 0.0, weights / distance))
    if rewrite:
        values = winners if tau is None else values_of(winners, tau, sparsifier)
        grad.copy_(factor * values if base is None else base.to(values.dtype) + factor * values)


turn = Tilewise(_turn_in_steps, _turn)
"""`turn(grad, squares, base, tau, factor, sparsifier, rewrite)`: backward of a tile of the distance kernel's update.

Each of `squares` becomes the gradient of K over that piece's distances; `grad` becomes `base + factor * update`.
"""


def _sort_out_in_steps(chunk: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    sizes = chunk.abs()
    below = sizes < low
    return below.count_nonzero(), (sizes <= high).logical_xor_(below)


def _sort_out(chunk: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    sizes = chunk.abs()
    below = sizes < low
    return below.sum(), (sizes <= high) & ~below


sort_out = Tilewise(_sort_out_in_steps, _sort_out)
"""`sort_out(chunk, low, high)`: how many entries are below `low` by absolute value, and a mask of those up to `high`."""
