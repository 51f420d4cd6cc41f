"""Kernels: how two small factor tensors become one full-size matrix, and the gradient in closed form.

    in_factors  Q (pieces, in,  rank/pieces)  ┐
                                              ├─ kappa ─>  K (out, in),   K[o, i] = kappa(P[o], Q[i])
    out_factors P (pieces, out, rank/pieces)  ┘

For example rank 4 in 2 pieces on a layer of 3 inputs and 5 outputs: Q is (2, 3, 2), P is (2, 5, 2), K is (5, 3).

An evaluation works on a tile of rows at a time, so that what it needs on the way stays in the processor's cache: of the
weight's size there is only the buffer that the caller gives. It turns the gradient of a tile into gradients of the
factors in closed form; autograd records nothing. Callers run all of it under `full_precision`.

Source: SNELL (arXiv 2411.01800), section 3; the coefficients are those of its released code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from snell_lightning.adapters.fused import differ, finish, shrink_, slopes, turn

# Distances in fewer columns than this are taken from differences: the expansion's error at small distances is large
# there, and such distances are frequent.
_FEW_COLUMNS = 8


class Evaluation(Protocol):
    """A kernel at given factors, in tiles of rows."""

    def fill(self, rows: slice, out: Tensor) -> None:
        """Write these rows of the matrix to `out (rows, in)`."""

    def backward(
        self,
        rows: slice,
        grad: Tensor,
        base: Tensor | None,
        tau: Tensor | None,
        factor: float,
        sparsifier: str,
        rewrite: bool,
    ) -> None:
        """Take the gradient of these rows of the update, and put `base + factor * update` in its place.

        Args:
            rows: Which rows.
            grad: Gradient of the update `(rows, in)`; overwritten if `rewrite` is true.
            base: What the update is added to, `(rows, in)`; zero by default.
            tau: The threshold; None where every entry takes part.
            factor: What the update is multiplied with.
            sparsifier: Which.
            rewrite: Whether the update is wanted.
        """

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of out and in factors from all that `backward` took."""


class DistanceEvaluation:
    """Piecewise linear distance: `K[o, i] = sum_h c_h |P[h, o] - Q[h, i]|` with `c = scale * (+1, -1, +1, ...)`.

    Squared distances come from one product, `[-2p, |p|^2, 1] . [q, 1, |q|^2]`. `K` is a difference of nearly equal
    distances, so the product must not lose what they have in common: factors are centred first (a distance does not
    change), and the product is a true fp32 one. Against differences in fp64, K is then right to about 1e-6 of its size.
    Where there are too few columns for that, differences are used.

    The gradient, with `M_h = c_h grad / D_h` (0 where `D_h` is 0), is `rowsum(M_h) P_h - M_h Q_h` for P, and for Q
    likewise; the products' columns of ones give the sums.

    Args:
        out_factors: P `(pieces, out, columns)`.
        in_factors: Q `(pieces, in, columns)`.
        scale: Size of the coefficients.
    """

    def __init__(self, out_factors: Tensor, in_factors: Tensor, scale: float) -> None:
        self.signs = [(-1) ** piece for piece in range(len(out_factors))]
        self.scale = scale
        centre = (out_factors.mean(1, keepdim=True) + in_factors.mean(1, keepdim=True)) / 2
        # Transposed, (pieces, columns, features), in which the products are faster; scaled, so that distances come
        # out as c_h D_h.
        p, q = ((factors - centre).mul_(scale).mT.contiguous() for factors in (out_factors, in_factors))
        p_squares, q_squares = p.square().sum(1, keepdim=True), q.square().sum(1, keepdim=True)
        self._p = torch.cat([-2 * p, p_squares, torch.ones_like(p_squares)], 1)
        self._q = torch.cat([q, torch.ones_like(q_squares), q_squares], 1)
        self._columns = p.shape[1]
        self._buffers = [p.new_empty(0) for _ in self.signs]
        self._sums: tuple[Tensor, Tensor] | None = None

    def fill(self, rows: slice, out: Tensor) -> None:
        """Write `K (rows, in)`."""
        differ(out, self._squares(rows))

    def backward(
        self,
        rows: slice,
        grad: Tensor,
        base: Tensor | None,
        tau: Tensor | None,
        factor: float,
        sparsifier: str,
        rewrite: bool,
    ) -> None:
        """See `Evaluation`."""
        if self._sums is None:
            self._sums = torch.empty_like(self._p), torch.zeros_like(self._q)
        squares = self._squares(rows)
        turn(grad, squares, base, tau, factor, sparsifier, rewrite)
        for piece, weights in enumerate(squares):
            self._sums[0][piece, :, rows] = self._q[piece] @ weights.T
            self._sums[1][piece].addmm_(self._p[piece, :, rows], weights)

    def _squares(self, rows: slice) -> list[Tensor]:
        """Squared distances of these rows, by piece."""
        squares = []
        for piece, buffer in enumerate(self._buffers):
            p, q = self._p[piece, :, rows], self._q[piece]
            out = buffer.resize_(p.shape[1], q.shape[1])
            if self._columns >= _FEW_COLUMNS:
                torch.mm(p.T, q, out=out)
            else:
                p, q = p[: self._columns].T * -0.5, q[: self._columns].T
                out.copy_(torch.cdist(p, q, compute_mode="donot_use_mm_for_euclid_dist")).square_()
            squares.append(out)
        return squares

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of P and Q, in their shapes."""
        assert self._sums is not None
        columns = self._columns
        (of_p, of_q), p, q = self._sums, self._p[:, :columns] * -0.5, self._q[:, :columns]
        grad_p = p.mul_(of_p[:, columns : columns + 1]).sub_(of_p[:, :columns])
        grad_q = (q * of_q[:, -1:]).add_(of_q[:, :columns], alpha=0.5)
        factors = self.scale * p.new_tensor(self.signs).view(-1, 1, 1)
        return grad_p.mul_(factors).mT.contiguous(), grad_q.mul_(factors).mT.contiguous()


class LinearEvaluation:
    """The inner product `K[o, i] = P[o] . Q[i]`: LoRA's update, of rank `rank` at most.

    Args:
        out_factors: P `(pieces, out, columns)`.
        in_factors: Q `(pieces, in, columns)`.
    """

    def __init__(self, out_factors: Tensor, in_factors: Tensor) -> None:
        # Pieces one below the other, (rank, features).
        self._p, self._q = (factors.mT.flatten(0, 1).contiguous() for factors in (out_factors, in_factors))
        self._sums = torch.zeros_like(self._p), torch.zeros_like(self._q)
        self._pieces = len(out_factors)

    def fill(self, rows: slice, out: Tensor) -> None:
        """Write `K (rows, in)`."""
        torch.mm(self._p[:, rows].T, self._q, out=out)

    def backward(
        self,
        rows: slice,
        grad: Tensor,
        base: Tensor | None,
        tau: Tensor | None,
        factor: float,
        sparsifier: str,
        rewrite: bool,
    ) -> None:
        """See `Evaluation`."""
        tile = self._p.new_empty(grad.shape)
        self.fill(rows, tile)
        weights = grad.to(tile.dtype)
        if tau is not None:
            weights = weights * slopes(shrink_(tile.clone(), tau), tau, sparsifier)
        self._sums[0][:, rows] = self._q @ weights.T
        self._sums[1].addmm_(self._p[:, rows], weights)
        if rewrite:
            finish(tile, base, tau, factor, sparsifier)
            grad.copy_(tile)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of P and Q, in their shapes."""
        of_p, of_q = (sums.unflatten(0, (self._pieces, -1)).mT.contiguous() for sums in self._sums)
        return of_p, of_q


KERNELS = ("distance", "linear")


def evaluate(kernel: str, out_factors: Tensor, in_factors: Tensor, scale: float) -> Evaluation:
    """The kernel of that name, one of `KERNELS`, at these factors.

    Args:
        kernel: Its name.
        out_factors: P `(pieces, out, columns)`.
        in_factors: Q `(pieces, in, columns)`.
        scale: Size of the distance kernel's coefficients.
    """
    if kernel == "distance":
        return DistanceEvaluation(out_factors, in_factors, scale)
    return LinearEvaluation(out_factors, in_factors)


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
