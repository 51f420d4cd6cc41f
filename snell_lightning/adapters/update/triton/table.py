"""Where the updates that one launch works on lie: addresses, sizes, and which program does which rows.

A launch serves updates of different shapes, those of a fused projection or of a whole model. Their factors are
parameters with memory of their own, so a launch is given a table of addresses on the device. It holds as long as no
factor moves; values may change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Sides of a tile, and the warps that work on it: with half as many, registers spill.
ROWS, PLACES, WARPS = 64, 64, 8
# Elements of a factor's gradient that a program of the reduction sums up.
REDUCED = 1024


class Where(NamedTuple):
    """Where an update lies: the addresses of its factors, and their sizes."""

    out_factors: int
    in_factors: int
    pieces: int
    height: int
    width: int
    columns: int


@dataclass(frozen=True)
class Table:
    """Updates that are worked on together.

    Attributes:
        updates: `(updates, 8)`: address of P, of Q, height, width, columns, the first row in the weight, and where the
            partial gradients of P and of Q begin.
        programs: `(programs, 2)`: an update, and the block of its rows.
        sums: `(2 updates, 4)`: of each factor where its partial gradients begin, its elements, the number of partial
            gradients, and where the gradient begins.
        reductions: `(programs, 2)`: a factor, and the block of its elements.
        widest: The largest width.
        partial: Elements of all partial gradients.
        elements: Elements of all factors.
    """

    updates: Tensor
    programs: Tensor
    sums: Tensor
    reductions: Tensor
    widest: int
    partial: int
    elements: int


@lru_cache(maxsize=1024)
def make_table(updates: tuple[Where, ...], device: torch.device) -> Table:
    """The table of these updates; the same one for the same updates.

    Args:
        updates: Where each one lies.
        device: Where the factors live.
    """
    rows: list[list[int]] = []
    programs: list[list[int]] = []
    sums: list[list[int]] = []
    reductions: list[list[int]] = []
    row = partial = elements = 0
    for number, at in enumerate(updates):
        blocks, strips = -(-at.height // ROWS), -(-at.width // PLACES)
        of_p, of_q = at.pieces * at.height * at.columns, at.pieces * at.width * at.columns
        starts = partial, partial + strips * of_p
        rows.append([at.out_factors, at.in_factors, at.height, at.width, at.columns, row, *starts])
        programs += [[number, block] for block in range(blocks)]
        for count, start, parts in ((of_p, starts[0], strips), (of_q, starts[1], blocks)):
            reductions += [[len(sums), block] for block in range(-(-count // REDUCED))]
            sums.append([start, count, parts, elements])
            elements += count
        partial = starts[1] + blocks * of_q
        row += at.height
    return Table(
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(programs, dtype=torch.int32, device=device),
        torch.tensor(sums, dtype=torch.int64, device=device),
        torch.tensor(reductions, dtype=torch.int32, device=device),
        max(at.width for at in updates),
        partial,
        elements,
    )


def where(out_factors: Sequence[Tensor], in_factors: Sequence[Tensor]) -> tuple[Where, ...]:
    """Where these updates lie.

    Args:
        out_factors: P of each, `(pieces, out, columns)`, contiguous.
        in_factors: Q of each, `(pieces, in, columns)`, contiguous.
    """
    return tuple(
        Where(p.data_ptr(), q.data_ptr(), len(p), p.shape[1], q.shape[1], p.shape[2])
        for p, q in zip(out_factors, in_factors, strict=True)
    )
