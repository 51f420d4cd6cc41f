"""Entries of a kernel's matrix, made where they are needed: the part that all of this folder's programs share.

A program holds a tile `(rows, columns)` of the matrix in registers. It adds one column of the factors after the other,

    D_h[o, i]^2 = sum_c (P[h, o, c] - Q[h, i, c])^2,    K = scale * (D_0 - D_1 + D_2 - ...)      `distance`
                                                        K = sum_h sum_c P[h, o, c] Q[h, i, c]    `linear`

in fp32 from differences: no product of matrices, so nothing that TF32 or an expansion would round away. The order is
that of the columns whatever the tile's size is, so that all programs see the same bits: the threshold is the value of
an entry, and what is compared with it must not differ in the last one.

The plain statement of the same is `kernels.evaluate` and `competition.py`.
"""

import triton
import triton.language as tl

# Sparsifiers by number: a program is compiled for one. `none` is for updates without a threshold.
MAGNITUDE, SOFT, HARD, NONE = 0, 1, 2, 3
SPARSIFIERS = {"magnitude": MAGNITUDE, "soft": SOFT, "hard": HARD, "none": NONE}


@triton.jit
def factors_of(updates, update, TYPE: tl.constexpr):
    """P and Q of an update in a `Table`, then its height, width and columns."""
    about = updates + 8 * update
    p = tl.load(about).to(tl.pointer_type(TYPE))
    q = tl.load(about + 1).to(tl.pointer_type(TYPE))
    height = tl.load(about + 2).to(tl.int32)
    width = tl.load(about + 3).to(tl.int32)
    columns = tl.load(about + 4).to(tl.int32)
    return p, q, height, width, columns


@triton.jit
def rows_of_weight(updates, update, rows, height, order):
    """The weight's rows that an update's rows belong to; where they do not lie together the order tells."""
    of_weight = tl.load(updates + 8 * update + 5) + rows
    if order is not None:
        of_weight = tl.load(order + of_weight, mask=rows < height, other=0)
    return of_weight


@triton.jit
def distance_or_product(p, q, height, width, columns, piece, rows, places, DISTANCE: tl.constexpr):
    """One piece's distances, or its inner products, `(rows, places)`, of P `(pieces, height, columns)` and Q."""
    p_rows = p + (piece * height + rows) * columns
    q_rows = q + (piece * width + places) * columns
    total = tl.zeros((rows.shape[0], places.shape[0]), tl.float32)
    for column in range(columns):
        of_p = tl.load(p_rows + column, mask=rows < height, other=0.0).to(tl.float32)
        of_q = tl.load(q_rows + column, mask=places < width, other=0.0).to(tl.float32)
        if DISTANCE:
            difference = of_p[:, None] - of_q[None, :]
            total = tl.fma(difference, difference, total)
        else:
            total = tl.fma(of_p[:, None] + tl.zeros_like(total), of_q[None, :] + tl.zeros_like(total), total)
    if DISTANCE:
        total = tl.sqrt_rn(total)
    return total


@triton.jit
def entries(
    p, q, height, width, columns, scale, rows, places, PIECES: tl.constexpr, DISTANCE: tl.constexpr
):  # fmt: skip
    """The matrix's entries `(rows, places)`."""
    total = tl.zeros((rows.shape[0], places.shape[0]), tl.float32)
    for piece in tl.static_range(PIECES):
        part = distance_or_product(p, q, height, width, columns, piece, rows, places, DISTANCE)
        if DISTANCE and piece % 2 == 1:
            total -= part
        else:
            total += part
    if DISTANCE:
        total *= scale
    return total


@triton.jit
def survivors(matrix, tau, SPARSIFIER: tl.constexpr):
    """The update's entries: 0 where an absolute value is not above the threshold; NaN stays."""
    size = tl.abs(matrix)
    if SPARSIFIER == 0:
        value = matrix * size
    elif SPARSIFIER == 1:
        value = matrix * (size - tau)
    else:
        value = matrix
    if SPARSIFIER != 3:
        value = tl.where(size <= tau, 0.0, value)
    return value


@triton.jit
def rounded_at_random(value, key, places):
    """fp32 numbers that bf16 holds, each a neighbour of the value; plainly stated in `rounding.py`."""
    noise = (tl.randint(key, places) & 0xFFFF).to(tl.int32)
    cut = ((value.to(tl.int32, bitcast=True) + noise) & -65536).to(tl.float32, bitcast=True)
    return tl.where(value == value, cut, value)


@triton.jit
def slopes(matrix, tau, SPARSIFIER: tl.constexpr):
    """What the update's gradient is multiplied with to become the matrix's."""
    size = tl.abs(matrix)
    if SPARSIFIER == 0:
        slope = size
    elif SPARSIFIER == 1:
        slope = 2 * size - tau
    else:
        slope = tl.full(matrix.shape, 1.0, tl.float32)
    if SPARSIFIER != 3:
        slope = tl.where(size <= tau, 0.0, slope)
    return slope
