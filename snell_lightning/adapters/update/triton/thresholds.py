"""Thresholds of many updates at once, exact, in a fixed number of launches and without a word to the host.

The threshold is the k-th smallest absolute value of a matrix. Positive fp32 numbers are in the order of their bits, so
it is found from the top bit down, eight bits at a time:

    pass 0   bits 30..23 of every |K| are counted in 256 bins; the bin in which the k-th lies gives its bits
    pass 1   bits 22..15 of those |K| that begin so, and so on; pass 3 has the last seven

Each pass makes K again from the factors, tile by tile; nothing of a matrix's size is written. Counts are integers, so
that adding them up in any order gives the same.

The plain statement of the same is `competition.threshold`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from snell_lightning.adapters.update.competition import TIED
from snell_lightning.adapters.update.triton.entries import entries, factors_of
from snell_lightning.adapters.update.triton.table import PLACES, ROWS, WARPS, Table

PASSES, BINS = 4, 256
# Launches of `thresholds`: the bins set to zero, the passes, and the last choice.
LAUNCHES = PASSES + 2


@triton.jit
def _chosen(counts, update, rank, DONE: tl.constexpr, BINS: tl.constexpr, PASSES: tl.constexpr):
    """The bits that the first passes found, and the rank among the values that begin with them."""
    bins = tl.arange(0, BINS)
    prefix = 0
    for done in tl.static_range(DONE):
        count = tl.load(counts + (update * PASSES + done) * BINS + bins)
        up_to = tl.cumsum(count, 0)
        digit = tl.sum((up_to < rank).to(tl.int32), 0)
        rank -= tl.sum(tl.where(bins < digit, count, 0), 0)
        prefix = prefix * (128 if done == 3 else 256) + digit
    return prefix, rank


@triton.jit
def _count(
    updates, programs, scales, ranks, counts,
    DONE: tl.constexpr, PIECES: tl.constexpr, DISTANCE: tl.constexpr, TYPE: tl.constexpr,
    ROWS: tl.constexpr, PLACES: tl.constexpr, BINS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    update = tl.load(programs + 2 * program)
    block = tl.load(programs + 2 * program + 1)
    p, q, height, width, columns = factors_of(updates, update, TYPE)
    scale = tl.load(scales + update)
    prefix, _ = _chosen(counts, update, tl.load(ranks + update), DONE, BINS, PASSES)
    rows = block * ROWS + tl.arange(0, ROWS)
    found = tl.zeros((BINS,), tl.int32)
    for start in range(0, width, PLACES):
        places = start + tl.arange(0, PLACES)
        matrix = entries(p, q, height, width, columns, scale, rows, places, PIECES, DISTANCE)
        bits = tl.abs(matrix).to(tl.int32, bitcast=True)
        inside = (rows < height)[:, None] & (places < width)[None, :]
        if DONE == 0:
            digits = bits >> 23
        elif DONE == 1:
            inside = inside & ((bits >> 23) == prefix)
            digits = (bits >> 15) & 255
        elif DONE == 2:
            inside = inside & ((bits >> 15) == prefix)
            digits = (bits >> 7) & 255
        else:
            inside = inside & ((bits >> 7) == prefix)
            digits = bits & 127
        found += tl.histogram(tl.reshape(digits, (ROWS * PLACES,)), BINS, tl.reshape(inside, (ROWS * PLACES,)))
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts + (update * PASSES + DONE) * BINS + bins, found, mask=found > 0, sem="relaxed")


@triton.jit
def _choose(ranks, counts, taus, TIED: tl.constexpr, BINS: tl.constexpr, PASSES: tl.constexpr):
    update = tl.program_id(0)
    bits, _ = _chosen(counts, update, tl.load(ranks + update), PASSES, BINS, PASSES)
    tau = bits.to(tl.float32, bitcast=True)
    tl.store(taus + update, tl.where(tau == 0.0, TIED, tau))


def thresholds(table: Table, scales: Tensor, ranks: Tensor, pieces: int, distance: bool, kind: tl.dtype) -> Tensor:
    """The threshold of each update, `(updates,)` in fp32; `TIED` where it is 0.

    Args:
        table: The updates.
        scales: Of each, the size of the distance kernel's coefficients, fp32.
        ranks: Of each, the rank of the threshold among the absolute values, from 1 for the smallest; int32.
        pieces: Of the factors.
        distance: Whether the kernel is `distance`, not `linear`.
        kind: The factors' type.
    """
    count = len(table.updates)
    counts = torch.zeros(count, PASSES, BINS, dtype=torch.int32, device=scales.device)
    taus = torch.empty(count, dtype=torch.float32, device=scales.device)
    for done in range(PASSES):
        _count[(len(table.programs),)](
            table.updates, table.programs, scales, ranks, counts,
            DONE=done, PIECES=pieces, DISTANCE=distance, TYPE=kind,
            ROWS=ROWS, PLACES=PLACES, BINS=BINS, PASSES=PASSES, num_warps=WARPS,
        )  # fmt: skip
    _choose[(count,)](ranks, counts, taus, TIED=TIED, BINS=BINS, PASSES=PASSES)
    return taus
