"""Competition: the entries of one matrix compete, and only the largest survive.

With `n` entries and a sparsity `s`, the threshold tau is the k-th smallest absolute value, `k = floor(s (n - 1)) + 1`,
and the survivors are the entries with |K| > tau. So 5 entries at sparsity 0.5 have k = 3: the two largest survive. This
is the set that an interpolated quantile with a strict comparison keeps, for any matrix size.

No index is stored: tau alone reproduces the set from K.

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

from snell_lightning.adapters.fused import sort_out

SPARSIFIERS = ("magnitude", "soft", "hard", "none")

# Entries that are worked on at once: what fits the processor's cache, or keeps an accelerator busy.
_TILE_ON_CPU, _TILE_ON_ACCELERATOR = 2**19, 2**22
# Entries that are sampled to find the threshold's neighbourhood, and how many standard deviations that reaches.
_SAMPLE, _DEVIATIONS = 2**14, 4.0


def tiles(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows, of a size to work on at once."""
    entries = _TILE_ON_CPU if matrix.device.type == "cpu" else _TILE_ON_ACCELERATOR
    rows = max(1, entries // max(1, matrix.shape[-1]))
    for start in range(0, len(matrix), rows):
        yield slice(start, min(start + rows, len(matrix)))


def threshold(matrix: Tensor, sparsity: float) -> Tensor:
    """The k-th smallest absolute value of `matrix`, exact for any size, as a tensor of no dimensions on its device.

    On the CPU a sample tells between which two values it lies, and only what lies there is sorted out; where the sample
    misleads, all entries are. On an accelerator the host never waits.

    Args:
        matrix: Any shape, floating point.
        sparsity: Fraction of the entries to drop, in [0, 1).
    """
    count = matrix.numel()
    rank = math.floor(sparsity * (count - 1)) + 1
    if isinstance(matrix, FakeTensor):
        return matrix.new_empty(())
    if matrix.device.type == "cuda":
        # CUDA's selection of many values uses the whole device, its k-th value a single multiprocessor.
        kept = count - rank + 1
        largest = kept <= rank
        values = matrix.abs().flatten().topk(kept if largest else rank, largest=largest, sorted=False).values
        return values.amin() if largest else values.amax()
    found = _by_sample(matrix, rank) if matrix.device.type == "cpu" and count > 8 * _SAMPLE else None
    return matrix.abs().flatten().kthvalue(rank).values if found is None else found


def _by_sample(matrix: Tensor, rank: int) -> Tensor | None:
    """The value of that rank, or None where it is not between the two values that a sample gives."""
    entries = matrix.flatten()
    step = len(entries) // _SAMPLE
    while math.gcd(step, matrix.shape[-1]) > 1:  # else the sample would see some columns only
        step += 1
    sample = entries[::step].abs()
    middle = rank / len(entries) * len(sample)
    spread = _DEVIATIONS * math.sqrt(middle * max(0.0, 1 - middle / len(sample))) + 2
    first, last = math.floor(middle - spread), math.ceil(middle + spread)
    infinity = sample.new_tensor(math.inf)
    low = sample.kthvalue(first).values if first >= 1 else -infinity
    high = sample.kthvalue(last).values if last <= len(sample) else infinity
    below, between = 0, []
    for chunk in entries.split(_TILE_ON_CPU):
        lower, inside = sort_out(chunk, low, high)
        below += int(lower)
        # numpy finds the set entries of a mask several times as fast.
        between.append(chunk[torch.from_numpy(inside.numpy().nonzero()[0])].abs_())
    candidates = torch.cat(between)
    if not below < rank <= below + len(candidates):
        return None
    return candidates.kthvalue(rank - below).values
