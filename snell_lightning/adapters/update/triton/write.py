"""The update, or the weight with the update, of one layer in one launch: one read of the weight, one write.

The plain statement of the same is `UpdateRule.write`, called for one update after the other.
"""

import triton
import triton.language as tl
from torch import Tensor

from snell_lightning.adapters.update.triton.entries import (
    entries,
    factors_of,
    rounded_at_random,
    rows_of_weight,
    survivors,
)
from snell_lightning.adapters.update.triton.table import PLACES, ROWS, WARPS, Table


@triton.jit(do_not_specialize=["number"])
def _write(
    updates, programs, taus, scales, factor, order, base, base_stride, out, width, seed, number,
    RANDOM: tl.constexpr, PIECES: tl.constexpr, DISTANCE: tl.constexpr, SPARSIFIER: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    update = tl.load(programs + 2 * program)
    p, q, height, _, columns = factors_of(updates, update, TYPE)
    rows = tl.load(programs + 2 * program + 1) * ROWS + tl.arange(0, ROWS)
    places = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    tau = 0.0
    if SPARSIFIER != 3:
        tau = tl.load(taus + update)
    scale = tl.load(scales + update)
    value = survivors(entries(p, q, height, width, columns, scale, rows, places, PIECES, DISTANCE), tau, SPARSIFIER)
    value *= factor
    inside = (rows < height)[:, None] & (places < width)[None, :]
    of_weight = rows_of_weight(updates, update, rows, height, order)
    if base is not None:
        here = base + of_weight[:, None] * base_stride + places[None, :]
        value += tl.load(here, mask=inside, other=0.0).to(tl.float32)
    at = of_weight[:, None] * width + places[None, :]
    if RANDOM:
        key = number
        if seed is not None:
            key = tl.load(seed)
        value = rounded_at_random(value, key, at)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def write(
    table: Table,
    taus: Tensor | None,
    out: Tensor,
    base: Tensor | None,
    order: Tensor | None,
    scales: Tensor,
    factor: float,
    pieces: int,
    distance: bool,
    sparsifier: int,
    kind: tl.dtype,
    seed: Tensor | int | None = None,
) -> None:
    """Write `base + factor * update` to `out (out, in)`, rounded once to its type.

    Args:
        table: The layer's updates.
        taus: The threshold of each; None where they are dense.
        out: Contiguous.
        base: `(out, in)` of any floating type, with contiguous rows, or None for zero.
        order: The row of the weight that each row of the updates belongs to, or None where they are in turn.
        scales: Of each, the size of the distance kernel's coefficients, fp32.
        factor: What the update is multiplied with.
        pieces: Of the factors.
        distance: Whether the kernel is `distance`, not `linear`.
        sparsifier: Its number, from `SPARSIFIERS`.
        kind: The factors' type.
        seed: Of the numbers by which entries are rounded to bf16 at random, a tensor `()` where only the device knows;
            None rounds to the nearest.
    """
    stride = 0 if base is None else base.stride(0)
    _write[(len(table.programs), -(-table.widest // PLACES))](
        table.updates, table.programs, taus, scales, factor, order, base, stride, out, table.widest,
        seed if isinstance(seed, Tensor) else None, seed if isinstance(seed, int) else 2**32, RANDOM=seed is not None,
        PIECES=pieces, DISTANCE=distance, SPARSIFIER=sparsifier, TYPE=kind, ROWS=ROWS, PLACES=PLACES,
        num_warps=WARPS,
    )  # fmt: skip
