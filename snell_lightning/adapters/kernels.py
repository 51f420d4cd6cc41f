"""Kernels: how two small factor tensors become one full-size matrix, and the gradient in closed form.

    in_factors  Q (pieces, in,  rank/pieces)  ┐
                                              ├─ kappa ─>  K (out, in),   K[o, i] = kappa(P[o], Q[i])
    out_factors P (pieces, out, rank/pieces)  ┘

For example rank 4 in 2 pieces on a layer of 3 inputs and 5 outputs: Q is (2, 3, 2), P is (2, 5, 2), K is (5, 3).

A kernel computes `K` together with the parts that its gradient needs (`evaluate`), and turns the gradient of a loss
with respect to `K` into gradients of the factors (`gradients`). Nothing is recorded by autograd: the caller decides
what lives until backward, which is the factors alone. Callers run both under `full_precision`.

Source: SNELL (arXiv 2411.01800), section 3; the coefficients are those of its released code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Kernel(Protocol):
    """A function of two factor tensors whose value is a matrix."""

    def evaluate(self, out_factors: Tensor, in_factors: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The matrix `(out, in)`, and the parts that `gradients` needs."""

    def gradients(
        self, out_factors: Tensor, in_factors: Tensor, parts: list[Tensor], grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `out_factors` and `in_factors`, given `grad (out, in)`, the gradient of the matrix."""


class DistanceKernel:
    """Piecewise linear distance: `K[o, i] = sum_h c_h |P[h, o] - Q[h, i]|` with `c = scale * (+1, -1, +1, ...)`.

    The distances are computed from differences, not from `|p|^2 + |q|^2 - 2 p.q`: `K` is itself a difference of nearly
    equal distances, and that expansion would cost it most of its digits.

    Args:
        pieces: How many distances are summed with alternating sign, at least 1.
        scale: Size of the coefficients.
    """

    def __init__(self, pieces: int, scale: float) -> None:
        self.coefficients = [scale * (-1) ** piece for piece in range(pieces)]

    def evaluate(self, out_factors: Tensor, in_factors: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`K (out, in)` and the distances `(out, in)` of each piece."""
        distances = [
            torch.cdist(p, q, compute_mode="donot_use_mm_for_euclid_dist")
            for p, q in zip(out_factors, in_factors, strict=True)
        ]
        matrix = distances[0] * self.coefficients[0]
        for coefficient, distance in zip(self.coefficients[1:], distances[1:], strict=True):
            matrix.add_(distance, alpha=coefficient)
        return matrix, distances

    def gradients(
        self, out_factors: Tensor, in_factors: Tensor, parts: list[Tensor], grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """With `M_h = c_h grad / D_h` (0 where `D_h` is 0): `rowsum(M_h) P_h - M_h Q_h`, and `Q_h` likewise."""
        grad_out, grad_in = torch.empty_like(out_factors), torch.empty_like(in_factors)
        for piece, (coefficient, distance) in enumerate(zip(self.coefficients, parts, strict=True)):
            p, q = out_factors[piece], in_factors[piece]
            weights = torch.where(distance > 0, grad / distance, 0.0).mul_(coefficient)
            grad_out[piece] = weights.sum(1, keepdim=True) * p - weights @ q
            grad_in[piece] = weights.sum(0).unsqueeze(1) * q - weights.T @ p
        return grad_out, grad_in


class LinearKernel:
    """The inner product `K[o, i] = P[o] . Q[i]`: LoRA's update, of rank `rank` at most."""

    def evaluate(self, out_factors: Tensor, in_factors: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`K (out, in)`; the gradient needs no parts."""
        return torch.einsum("hor,hir->oi", out_factors, in_factors), []

    def gradients(
        self, out_factors: Tensor, in_factors: Tensor, parts: list[Tensor], grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`grad Q` and `grad^T P`, piece by piece."""
        return torch.matmul(grad, in_factors), torch.matmul(grad.T, out_factors)


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
