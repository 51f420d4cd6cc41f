"""Competition: the entries of one matrix compete, and only the largest survive.

With `n` entries and a sparsity `s`, the threshold tau is the k-th smallest absolute value, `k = floor(s (n - 1)) + 1`,
and the survivors are the entries with |K| > tau. So 5 entries at sparsity 0.5 have k = 3: the two largest survive. This
is the set that an interpolated quantile with a strict comparison keeps, for any matrix size.

No index is stored: tau alone reproduces the set from K.

Where that value is 0, the entries at 0 cannot be told apart, and none of them loses: tau is then a number just below 0
(`TIED`). So an update that starts at exactly zero has a gradient everywhere, under `hard` and `none`.

| name        | value on survivors | gradient on survivors, with respect to K | source                              |
|-------------|--------------------|------------------------------------------|-------------------------------------|
| `magnitude` | K |K|              | |K|                                      | released code of arXiv 2411.01800   |
| `soft`      | K (|K| - tau)      | 2 |K| - tau                              | Eq. 5 of arXiv 2411.01800           |
| `hard`      | K                  | 1                                        | a plain mask                        |
| `none`      | K, everywhere      | 1                                        | dense kernel tuning (KLoRA)         |

In `magnitude` the factor |K| counts as a constant for the gradient, in `soft` the threshold does. The factor also makes
the first step nearly the pretrained model: entries of 1e-3 become updates of 1e-6.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

SPARSIFIERS = ("magnitude", "soft", "hard", "none")

# Entries that are worked on at once: what fits the processor's cache, or keeps an accelerator busy.
_TILE_ON_CPU, _TILE_ON_ACCELERATOR = 2**18, 2**22
# The threshold below which no absolute value is; near enough to 0 to leave the formulas above as they are.
TIED = -torch.finfo(torch.float32).tiny
# Entries that are sampled to find the threshold's neighbourhood, and how many standard deviations that reaches.
SAMPLE, _DEVIATIONS = 2**14, 4.0


def tiles(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows, of a size to work on at once."""
    entries = _TILE_ON_CPU if matrix.device.type == "cpu" else _TILE_ON_ACCELERATOR
    rows = max(1, entries // max(1, matrix.shape[-1]))
    for start in range(0, len(matrix), rows):
        yield slice(start, min(start + rows, len(matrix)))


def threshold(matrix: Tensor, sparsity: float) -> Tensor:
    """The k-th smallest absolute value of `matrix`, exact for any size, as a tensor of no dimensions on its device.

    `TIED` where that is 0. On the CPU a sample tells between which two values it lies, and only what lies there is
    sorted out; where the sample misleads, all entries are. On an accelerator the host never waits.

    Args:
        matrix: Any shape, floating point.
        sparsity: Fraction of the entries to drop, in [0, 1).
    """
    count = matrix.numel()
    rank = survivors_rank(count, sparsity)
    if isinstance(matrix, FakeTensor) and count > 8 * SAMPLE:
        return matrix.new_empty(())
    if matrix.device.type == "cuda":
        # CUDA's selection of many values uses the whole device, its k-th value a single multiprocessor.
        kept = count - rank + 1
        largest = kept <= rank
        values = matrix.abs().flatten().topk(kept if largest else rank, largest=largest, sorted=False).values
        return _above_zero(values.amin() if largest else values.amax())
    found = _by_sample(matrix, rank) if matrix.device.type == "cpu" and count > 8 * SAMPLE else None
    return _above_zero(matrix.abs().flatten().kthvalue(rank).values if found is None else found)


def _above_zero(tau: Tensor) -> Tensor:
    """A threshold, or `TIED` in place of 0."""
    return tau.masked_fill(tau == 0, TIED)


def shrink_(matrix: Tensor, tau: Tensor) -> Tensor:
    """Set the entries that are not above the threshold by absolute value to zero, in place."""
    if matrix.device.type == "cpu" and not isinstance(tau, FakeTensor):
        return torch.hardshrink(matrix, tau.item(), out=matrix)
    return matrix.masked_fill_(matrix.abs() <= tau, 0.0)


def survivor_values_(winners: Tensor, tau: Tensor, sparsifier: str, scratch: Tensor) -> Tensor:
    """Turn what `shrink_` left into the update's entries, in place.

    Args:
        winners: From `shrink_`.
        tau: The threshold.
        sparsifier: Which.
        scratch: Of the same shape; overwritten.
    """
    if sparsifier == "magnitude":
        return winners.mul_(torch.abs(winners, out=scratch))
    if sparsifier == "soft":
        return winners.mul_(torch.abs(winners, out=scratch).sub_(tau))
    return winners


def survivor_slopes(winners: Tensor, tau: Tensor, sparsifier: str, out: Tensor) -> Tensor:
    """What the update's gradient is multiplied with to become the matrix's, for what `shrink_` left.

    Args:
        winners: From `shrink_`.
        tau: The threshold.
        sparsifier: Which.
        out: Where it is written, of the same shape.
    """
    torch.abs(winners, out=out)
    if sparsifier == "magnitude":
        return out
    alive = (out <= tau).logical_not_()
    return out.mul_(2).sub_(alive * tau) if sparsifier == "soft" else out.copy_(alive)


def survivors_rank(count: int, sparsity: float) -> int:
    """The rank, from 1 for the smallest, of the absolute value among `count` that survivors are above."""
    return math.floor(sparsity * (count - 1)) + 1


def sample_step(matrix: Tensor) -> int:
    """The distance between the entries of a sample of `SAMPLE` entries or somewhat fewer."""
    step = matrix.numel() // SAMPLE
    while math.gcd(step, matrix.shape[-1]) > 1:  # else the sample would see some columns only
        step += 1
    return step


def bracket(sample: Tensor, fraction: float) -> tuple[float, float]:
    """Two values between which that quantile of the whole lies, but for one case in ten thousand.

    Args:
        sample: Absolute values `(count,)`.
        fraction: Which quantile.
    """
    if isinstance(sample, FakeTensor):
        return -math.inf, math.inf
    middle = fraction * len(sample)
    spread = _DEVIATIONS * math.sqrt(middle * max(0.0, 1 - middle / len(sample))) + 2
    first, last = math.floor(middle - spread), math.ceil(middle + spread)
    low = sample.kthvalue(first).values.item() if first >= 1 else -math.inf
    high = sample.kthvalue(last).values.item() if last <= len(sample) else math.inf
    return low, high


def _by_sample(matrix: Tensor, rank: int) -> Tensor | None:
    """The value of that rank, or None where it is not between the two values that a sample gives."""
    entries = matrix.flatten()
    low, high = bracket(entries[:: sample_step(matrix)].abs(), rank / len(entries))
    below = within = 0
    between = []
    scratch = entries.new_empty(min(_TILE_ON_CPU, len(entries)))
    for chunk in entries.split(_TILE_ON_CPU):
        magnitudes = torch.abs(chunk, out=scratch[: len(chunk)])
        lower = magnitudes < low
        below += int(lower.count_nonzero())
        inside = (magnitudes <= high).logical_xor_(lower)
        within += int(inside.count_nonzero())
        if low < high:
            # numpy finds the set entries of a mask several times as fast.
            between.append(magnitudes[torch.from_numpy(inside.numpy().nonzero()[0])])
    if not below < rank <= below + within:
        return None
    # Entries within are equal where the two values are, as in an update that starts at zero.
    return torch.cat(between).kthvalue(rank - below).values if between else entries.new_tensor(low)
