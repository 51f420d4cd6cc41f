"""Kernels: how two small factor tensors become one full-size matrix, and the gradient in closed form.

    in_factors  Q (pieces, in,  rank/pieces)  ┐
                                              ├─ kappa ─>  K (out, in),   K[o, i] = kappa(P[o], Q[i])
    out_factors P (pieces, out, rank/pieces)  ┘

For example rank 4 in 2 pieces on a layer of 3 inputs and 5 outputs: Q is (2, 3, 2), P is (2, 5, 2), K is (5, 3).

A kernel is evaluated a tile of rows at a time, so that what it needs on the way stays in the processor's cache: of the
weight's size there is only the buffer that the caller gives. `gradients` turns the gradient of a tile into gradients of
the factors, in closed form; autograd records nothing. Callers run all of it under `full_precision`.

Source: SNELL (arXiv 2411.01800), section 3; the coefficients are those of its released code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Distances in fewer columns than this are taken from differences: the expansion's error at small distances is large
# there, and such distances are frequent.
_FEW_COLUMNS = 8


class Kernel(Protocol):
    """A function of two factor tensors whose value is a matrix, made in tiles of rows."""

    def prepare(self, out_factors: Tensor, in_factors: Tensor) -> Any:
        """What all tiles have in common, of the factors' size."""

    def evaluate(self, prepared: Any, rows: slice, out: Tensor) -> list[Tensor]:
        """Write rows of the matrix to `out (rows, in)`; returns what `gradients` wants to know of these rows."""

    def gradients(
        self, prepared: Any, rows: slice, tile: Tensor, parts: list[Tensor], grad: Tensor, grads: tuple[Tensor, Tensor]
    ) -> None:
        """Add one tile's share to `grads`, which start at zero and end in `finish`.

        Args:
            prepared: From `prepare`.
            rows: Which rows of the matrix.
            tile: Those rows `(rows, in)`, from `evaluate`.
            parts: From `evaluate`; may be overwritten.
            grad: Gradient of the rows `(rows, in)`.
            grads: Gradients of `out_factors` and `in_factors`, in the factors' shapes.
        """


@dataclass(frozen=True)
class _Centred:
    """Factors around their common centre, and as the two sides of one product that gives squared distances."""

    left: Tensor
    right: Tensor
    out_factors: Tensor
    in_factors: Tensor


class DistanceKernel:
    """Piecewise linear distance: `K[o, i] = sum_h c_h |P[h, o] - Q[h, i]|` with `c = scale * (+1, -1, +1, ...)`.

    Squared distances come from one product, `[-2p, |p|^2, 1] . [q, 1, |q|^2]`. `K` is a difference of nearly equal
    distances, so the product must not lose what they have in common: factors are centred first (a distance does not
    change), and the product is a true fp32 one. Against distances from differences in fp64, K is then right to about
    1e-6 of its size. Where there are too few columns for that, differences are used.

    Args:
        pieces: How many distances are summed with alternating sign, at least 1.
        scale: Size of the coefficients.
    """

    def __init__(self, pieces: int, scale: float) -> None:
        self.scale = scale
        self.signs = [(-1) ** piece for piece in range(pieces)]

    def prepare(self, out_factors: Tensor, in_factors: Tensor) -> _Centred:
        """Centre the factors, and multiply them by the scale, so that distances come out as `c_h D_h` at once."""
        centre = (out_factors.mean(1, keepdim=True) + in_factors.mean(1, keepdim=True)) / 2
        p, q = (out_factors - centre) * self.scale, (in_factors - centre) * self.scale
        p_squares, q_squares = p.square().sum(-1, keepdim=True), q.square().sum(-1, keepdim=True)
        left = torch.cat([-2 * p, p_squares, torch.ones_like(p_squares)], -1)
        right = torch.cat([q, torch.ones_like(q_squares), q_squares], -1)
        return _Centred(left, right, p, q)

    def evaluate(self, prepared: _Centred, rows: slice, out: Tensor) -> list[Tensor]:
        """`K` of these rows; the parts are all scaled distances but the first, which `K` and they give."""
        self._distances(prepared, 0, rows, out)
        parts = []
        for piece, sign in enumerate(self.signs[1:], start=1):
            distances = self._distances(prepared, piece, rows, torch.empty_like(out))
            out.add_(distances, alpha=sign)
            parts.append(distances)
        return parts

    def gradients(
        self,
        prepared: _Centred,
        rows: slice,
        tile: Tensor,
        parts: list[Tensor],
        grad: Tensor,
        grads: tuple[Tensor, Tensor],
    ) -> None:
        """With `M_h = c_h grad / D_h` (0 where `D_h` is 0): `rowsum(M_h) P_h - M_h Q_h`, and `Q_h` likewise."""
        first = tile.clone()
        for sign, distances in zip(self.signs[1:], parts, strict=True):
            first.add_(distances, alpha=-sign)
        columns = prepared.in_factors.shape[-1]
        for piece, (sign, distances) in enumerate(zip(self.signs, [first, *parts], strict=True)):
            p, q = prepared.out_factors[piece, rows], prepared.in_factors[piece]
            # 1 / 0 counts 0; a NaN stays one.
            weights = distances.reciprocal_().nan_to_num_(nan=torch.nan, posinf=0.0, neginf=0.0).mul_(grad)
            factor = sign * self.scale
            # The columns of ones give the row and column sums.
            product = weights @ prepared.right[piece, :, : columns + 1]
            grads[0][piece, rows] = (product[:, columns:] * p).sub_(product[:, :columns]).mul_(factor)
            product = weights.T @ prepared.left[piece, rows]
            grads[1][piece].add_((product[:, -1:] * q).add_(product[:, :columns], alpha=0.5), alpha=factor)

    def _distances(self, prepared: _Centred, piece: int, rows: slice, out: Tensor) -> Tensor:
        if prepared.in_factors.shape[-1] >= _FEW_COLUMNS:
            torch.mm(prepared.left[piece, rows], prepared.right[piece].T, out=out)
            return out.clamp_min_(0).sqrt_()
        p, q = prepared.out_factors[piece, rows], prepared.in_factors[piece]
        return out.copy_(torch.cdist(p, q, compute_mode="donot_use_mm_for_euclid_dist"))


class LinearKernel:
    """The inner product `K[o, i] = P[o] . Q[i]`: LoRA's update, of rank `rank` at most."""

    def prepare(self, out_factors: Tensor, in_factors: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors with their pieces side by side, `(features, rank)`."""
        return out_factors.transpose(0, 1).flatten(1), in_factors.transpose(0, 1).flatten(1)

    def evaluate(self, prepared: tuple[Tensor, Tensor], rows: slice, out: Tensor) -> list[Tensor]:
        """`K` of these rows; the gradient needs no parts."""
        torch.mm(prepared[0][rows], prepared[1].T, out=out)
        return []

    def gradients(
        self,
        prepared: tuple[Tensor, Tensor],
        rows: slice,
        tile: Tensor,
        parts: list[Tensor],
        grad: Tensor,
        grads: tuple[Tensor, Tensor],
    ) -> None:
        """`grad Q` and `grad^T P`, piece by piece."""
        p, q = prepared
        grads[0][:, rows] = (grad @ q).unflatten(1, (len(grads[0]), -1)).transpose(0, 1)
        grads[1].add_((grad.T @ p[rows]).unflatten(1, (len(grads[1]), -1)).transpose(0, 1))


KERNELS = ("distance", "linear")


def make_kernel(name: str, pieces: int, scale: float) -> Kernel:
    """The kernel of that name, one of `KERNELS`."""
    return DistanceKernel(pieces, scale) if name == "distance" else LinearKernel()


def kernel_dtype(*tensors: Tensor) -> torch.dtype:
    """The type that kernels are computed in: fp32 whatever the tensors' type, fp64 where one of them is."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Compute in the tensors' own type: neither autocast nor reduced-precision (TF32, bf16) fp32 products."""
    previous = torch.get_float32_matmul_precision()
    with torch.autocast(device_type, enabled=False):
        if previous == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(previous)
