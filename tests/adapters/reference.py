"""A straightforward reading of the method, by autograd and without care for memory.

`frozen_at` holds a kernel matrix at which the constants of the sparsifiers' gradients (the factor |K| of
`magnitude`, the threshold of `soft`, every set of survivors) are taken; without it they are taken from the
matrix itself, detached.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from snell_lightning.adapters import SnellDelta


def kernel_matrix(delta: SnellDelta) -> Tensor:
    """K `(out, in)`, recorded by autograd; the norm's gradient at distance 0 is autograd's, which is 0."""
    config = delta.config
    out_factors, in_factors = delta.out_factors, delta.in_factors
    if config.kernel == "linear":
        return sum(p @ q.T for p, q in zip(out_factors, in_factors, strict=True))
    distances = torch.linalg.vector_norm(out_factors[:, :, None] - in_factors[:, None], dim=-1)
    signs = torch.tensor([(-1.0) ** piece for piece in range(config.pieces)], dtype=distances.dtype)
    distance = delta.scale * (signs[:, None, None] * distances).sum(0)
    if config.kernel == "mixture":
        return distance + delta.alpha * (distance / delta.gamma).softmax(0) + delta.beta
    return distance


def quantile(matrix: Tensor, sparsity: float) -> float:
    """NumPy's interpolated quantile of the absolute values, in double precision."""
    return float(np.quantile(matrix.detach().double().abs().numpy(), sparsity))


def update(delta: SnellDelta, frozen_at: Tensor | None = None) -> Tensor:
    """The update `(out, in)`, recorded by autograd with the constants of the method."""
    matrix = kernel_matrix(delta)
    if delta.config.sparsifier == "none" or delta.sparsity == 0:
        return matrix
    base = matrix.detach() if frozen_at is None else frozen_at
    kept = base.abs() > quantile(base, delta.sparsity)
    if delta.config.sparsifier == "magnitude":
        return matrix * base.abs() * kept
    if delta.config.sparsifier == "soft":
        largest_loser = base.abs()[~kept].max()
        return matrix * (matrix.abs() - largest_loser) * kept
    return matrix * kept


def tuned(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: list[SnellDelta],
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """`x W^T + b` plus the masked update's product, for `x (batch, ..., in)`."""
    entries, samples = masks
    extra = x if entries is None else x * entries.view(x.shape)
    extra = F.linear(extra, torch.cat([update(delta) for delta in deltas]))
    if samples is not None:
        extra = extra * samples.view(*x.shape[:-1], 1)
    return F.linear(x, weight, bias) + extra


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def relative_norm_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the expected norm, in double precision."""
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
