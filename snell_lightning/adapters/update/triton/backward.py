"""From the gradient of what was written to the factors' gradients, with the weight and the update in its place.

A program reads its tile of the gradient, writes its tile of `base + factor * update` over it, and sums its share of
the factors' gradients: with `M = c_h slope grad / D_h` (0 where `D_h` is 0),

    grad P_h[o] = sum_i M[o, i] (P_h[o] - Q_h[i])        grad Q_h[i] = -sum_o M[o, i] (P_h[o] - Q_h[i])

One launch leaves a sum for each strip of tiles, a second adds these up in a fixed order: no number is added to memory
that another program writes, so that a gradient is the same whenever it is made.

The plain statement of the same is `UpdateRule.backward`, called for one update after the other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from snell_lightning.adapters.update.triton.entries import (
    distance_or_product,
    entries,
    factors_of,
    rows_of_weight,
    slopes,
    survivors,
)
from snell_lightning.adapters.update.triton.table import PLACES, REDUCED, ROWS, WARPS, Table


@triton.jit
def _backward(
    updates, programs, taus, scales, factor, order, grad, base, base_stride, partial, width,
    REWRITE: tl.constexpr, PIECES: tl.constexpr, DISTANCE: tl.constexpr, SPARSIFIER: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    update = tl.load(programs + 2 * program)
    block = tl.load(programs + 2 * program + 1)
    p, q, height, _, columns = factors_of(updates, update, TYPE)
    rows = block * ROWS + tl.arange(0, ROWS)
    places = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    inside = (rows < height)[:, None] & (places < width)[None, :]
    of_weight = rows_of_weight(updates, update, rows, height, order)
    at = grad + of_weight[:, None] * width + places[None, :]
    tau = 0.0
    if SPARSIFIER != 3:
        tau = tl.load(taus + update)

    scale = tl.load(scales + update)
    matrix = entries(p, q, height, width, columns, scale, rows, places, PIECES, DISTANCE)
    slope = slopes(matrix, tau, SPARSIFIER) * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.where(inside, slope, 0.0)
    if REWRITE:
        value = survivors(matrix, tau, SPARSIFIER) * factor
        if base is not None:
            here = base + of_weight[:, None] * base_stride + places[None, :]
            value += tl.load(here, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, value.to(grad.dtype.element_ty), mask=inside)

    if DISTANCE:
        slope *= scale
    about = updates + 8 * update
    of_p = partial + tl.load(about + 6) + tl.program_id(1) * PIECES * height * columns
    of_q = partial + tl.load(about + 7) + block * PIECES * width * columns
    for piece in tl.static_range(PIECES):
        if DISTANCE:
            distance = distance_or_product(p, q, height, width, columns, piece, rows, places, DISTANCE)
            none = distance == 0.0
            weights = tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, distance)) * slope
            if piece % 2 == 1:
                weights = -weights
        else:
            weights = slope
        p_rows = (piece * height + rows) * columns
        q_rows = (piece * width + places) * columns
        for column in range(columns):
            p_column = tl.load(p + p_rows + column, mask=rows < height, other=0.0).to(tl.float32)
            q_column = tl.load(q + q_rows + column, mask=places < width, other=0.0).to(tl.float32)
            if DISTANCE:
                share = weights * (p_column[:, None] - q_column[None, :])
                p_sum, q_sum = tl.sum(share, 1), -tl.sum(share, 0)
            else:
                p_sum, q_sum = tl.sum(weights * q_column[None, :], 1), tl.sum(weights * p_column[:, None], 0)
            tl.store(of_p + p_rows + column, p_sum, mask=rows < height)
            tl.store(of_q + q_rows + column, q_sum, mask=places < width)


@triton.jit
def _reduce(sums, reductions, partial, out, factor, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    about = sums + 4 * tl.load(reductions + 2 * program)
    start = tl.load(about)
    elements = tl.load(about + 1)
    parts = tl.load(about + 2).to(tl.int32)
    places = tl.load(reductions + 2 * program + 1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total += tl.load(partial + start + part * elements + places, mask=inside, other=0.0)
    tl.store(out + tl.load(about + 3) + places, (total * factor).to(out.dtype.element_ty), mask=inside)


def backward(
    table: Table,
    taus: Tensor | None,
    grad: Tensor,
    base: Tensor | None,
    order: Tensor | None,
    scales: Tensor,
    factor: float,
    rewrite: bool,
    pieces: int,
    distance: bool,
    sparsifier: int,
    kind: tl.dtype,
    grads: Tensor,
) -> None:
    """Write the factors' gradients to `grads`, and `base + factor * update` over `grad` if `rewrite` is true.

    Args:
        table: The layer's updates.
        taus: As in `write`.
        grad: `(out, in)`, contiguous; overwritten.
        base: As in `write`.
        order: As in `write`.
        scales: As in `write`.
        factor: As in `write`.
        rewrite: Whether the update is wanted.
        pieces: As in `write`.
        distance: As in `write`.
        sparsifier: As in `write`.
        kind: As in `write`.
        grads: `(elements,)`: those of P and Q of each update in turn.
    """
    partial = torch.empty(table.partial, dtype=torch.float32, device=grad.device)
    stride = 0 if base is None else base.stride(0)
    _backward[(len(table.programs), -(-table.widest // PLACES))](
        table.updates, table.programs, taus, scales, factor, order, grad, base, stride, partial, table.widest,
        REWRITE=rewrite, PIECES=pieces, DISTANCE=distance, SPARSIFIER=sparsifier, TYPE=kind, ROWS=ROWS, PLACES=PLACES,
        num_warps=WARPS,
    )  # fmt: skip
    _reduce[(len(table.reductions),)](table.sums, table.reductions, partial, grads, factor, BLOCK=REDUCED)
