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

import torch
from torch import Tensor

SPARSIFIERS = ("magnitude", "soft", "hard", "none")


def threshold(matrix: Tensor, sparsity: float) -> Tensor:
    """The k-th smallest absolute value of `matrix`, exact for any size, as a tensor of no dimensions on its device.

    Args:
        matrix: Any shape, floating point.
        sparsity: Fraction of the entries to drop, in [0, 1).
    """
    rank = math.floor(sparsity * (matrix.numel() - 1)) + 1
    return matrix.abs().flatten().kthvalue(rank).values


def survivors(matrix: Tensor, tau: Tensor, sparsifier: str) -> Tensor:
    """The sparse update: the value of each surviving entry, zero elsewhere. Same shape as `matrix`."""
    magnitude = matrix.abs()
    lost = magnitude <= tau
    if sparsifier == "magnitude":
        values = matrix * magnitude
    elif sparsifier == "soft":
        values = matrix * (magnitude - tau)
    else:
        values = matrix.clone()
    return values.masked_fill_(lost, 0.0)


def survivor_slopes(matrix: Tensor, tau: Tensor, sparsifier: str) -> Tensor:
    """What the gradient of the update is multiplied with to become the gradient of `matrix`. Same shape."""
    magnitude = matrix.abs()
    lost = magnitude <= tau
    if sparsifier == "magnitude":
        slopes = magnitude
    elif sparsifier == "soft":
        slopes = 2 * magnitude - tau
    else:
        slopes = torch.ones_like(matrix)
    return slopes.masked_fill_(lost, 0.0)
