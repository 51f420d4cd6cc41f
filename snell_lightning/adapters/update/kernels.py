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

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from snell_lightning.adapters.update.competition import tiles

# Distances in fewer columns than this are taken from differences: the expansion's error at small distances is large
# there, and such distances are frequent.
_FEW_COLUMNS = 8


class Evaluation(Protocol):
    """A kernel at given factors, in tiles of rows."""

    def fill(self, rows: slice, out: Tensor) -> None:
        """Write these rows of the matrix to `out (rows, in)`."""

    def accumulate(self, rows: slice, grad: Tensor) -> None:
        """Take the gradient `(rows, in)` of the rows that `fill` wrote last."""

    def gradients(self) -> tuple[Tensor, ...]:
        """Gradients of out and in factors, and of the mixture's scalars, from all that was accumulated."""


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
        self._distances = p.new_empty(0)
        self._sums: tuple[Tensor, Tensor] | None = None

    def fill(self, rows: slice, out: Tensor) -> None:
        """Write `K (rows, in)`; the distances stay until the next call."""
        p, columns = self._p[:, :, rows], self._columns
        distances = self._distances.resize_(len(p), *out.shape)
        if columns >= _FEW_COLUMNS:
            torch.bmm(p.mT, self._q, out=distances).clamp_min_(0).sqrt_()
        else:
            for piece, of_piece in enumerate(distances):
                p_rows, q_rows = self._p[piece, :columns, rows].T * -0.5, self._q[piece, :columns].T
                of_piece.copy_(torch.cdist(p_rows, q_rows, compute_mode="donot_use_mm_for_euclid_dist"))
        if len(distances) == 1:
            out.copy_(distances[0])
        else:
            torch.sub(distances[0], distances[1], out=out)
        for sign, of_piece in zip(self.signs[2:], distances[2:], strict=True):
            out.add_(of_piece, alpha=sign)

    def accumulate(self, rows: slice, grad: Tensor) -> None:
        """Take the gradient `(rows, in)` of the rows that `fill` wrote last."""
        if self._sums is None:
            self._sums = torch.zeros_like(self._p), torch.zeros_like(self._q)
        # 1 / 0 counts 0; a NaN stays one.
        weights = self._distances.reciprocal_().nan_to_num_(nan=torch.nan, posinf=0.0, neginf=0.0).mul_(grad)
        self._sums[0][:, :, rows] += torch.bmm(self._q, weights.mT)
        self._sums[1].baddbmm_(self._p[:, :, rows], weights)

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

    def accumulate(self, rows: slice, grad: Tensor) -> None:
        """Add these rows' share of `grad Q` and `grad^T P`."""
        self._sums[0][:, rows] = self._q @ grad.T
        self._sums[1].addmm_(self._p[:, rows], grad)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of P and Q, in their shapes."""
        of_p, of_q = (sums.unflatten(0, (self._pieces, -1)).mT.contiguous() for sums in self._sums)
        return of_p, of_q


class MixtureEvaluation:
    """SNELLA's mixture, `K = d + alpha * softmax(d / gamma) + beta`: d the distance kernel, the softmax over the rows.

    The softmax needs a sum over each column, its gradient another: tiles are gone through once more for each, so that
    nothing of the matrix's size is kept. With `s` the softmax and `G` the gradient of K, the gradient of d is
    `G + alpha / gamma * s (G - c)`, where `c` is the sum of `s G` over the rows; that of alpha is the sum of `s G`,
    that of beta the sum of `G`, and that of gamma `alpha / gamma^2` times the sum of `s G (e - d)`, where `e` is
    the sum of `s d` over the rows.

    Source: SNELLA (arXiv 2510.24037).

    Args:
        out_factors: P `(pieces, out, columns)`.
        in_factors: Q `(pieces, in, columns)`.
        scale: Size of the distance kernel's coefficients.
        mixing: alpha, gamma and beta `(3,)`.
    """

    def __init__(self, out_factors: Tensor, in_factors: Tensor, scale: float, mixing: Tensor) -> None:
        self._distance = DistanceEvaluation(out_factors, in_factors, scale)
        self._alpha, self._gamma, self._beta = mixing.unbind()
        self._shape = torch.Size((out_factors.shape[1], in_factors.shape[1]))
        self._distances, self._softmax = (out_factors.new_empty(0) for _ in range(2))
        self._log_sums = out_factors.new_full((self._shape[1],), -math.inf)
        for rows in self._tiles():
            tile = self._distances.resize_(rows.stop - rows.start, self._shape[1])
            self._distance.fill(rows, tile)
            self._log_sums = torch.logaddexp(self._log_sums, tile.div_(self._gamma).logsumexp(0))
        # Over the rows, of each column: s G, s d and s G d; and G over all.
        self._of_softmax, self._mean, self._both = (torch.zeros_like(self._log_sums) for _ in range(3))
        self._of_beta = out_factors.new_zeros(())

    def fill(self, rows: slice, out: Tensor) -> None:
        """Write `K (rows, in)`; distances and softmax stay until the next call."""
        distances, softmax = self._of_rows(rows)
        torch.add(distances, self._beta, out=out).addcmul_(softmax, self._alpha)

    def accumulate(self, rows: slice, grad: Tensor) -> None:
        """Take the gradient `(rows, in)` of the rows that `fill` wrote last."""
        distances, softmax = self._distances, self._softmax
        shared = softmax * grad
        self._of_softmax += shared.sum(0)
        self._mean += (softmax * distances).sum(0)
        self._both += shared.mul(distances).sum(0)
        self._of_beta += grad.sum()
        self._distance.accumulate(rows, grad + shared.mul_(self._alpha / self._gamma))

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of P and Q, in their shapes, and of alpha, gamma and beta `(3,)`."""
        factor = self._alpha / self._gamma
        for rows in self._tiles():
            _, softmax = self._of_rows(rows)
            self._distance.accumulate(rows, softmax.mul_(self._of_softmax).mul_(-factor))
        of_p, of_q = self._distance.gradients()
        of_gamma = (self._of_softmax * self._mean - self._both).sum() * factor / self._gamma
        return of_p, of_q, torch.stack([self._of_softmax.sum(), of_gamma, self._of_beta])

    def _of_rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        shape = rows.stop - rows.start, self._shape[1]
        distances, softmax = self._distances.resize_(shape), self._softmax.resize_(shape)
        self._distance.fill(rows, distances)
        torch.div(distances, self._gamma, out=softmax).sub_(self._log_sums).exp_()
        return distances, softmax

    def _tiles(self) -> Iterator[slice]:
        return tiles(self._log_sums.expand(self._shape))


KERNELS = ("distance", "linear", "mixture")


def evaluate(
    kernel: str, out_factors: Tensor, in_factors: Tensor, scale: float, mixing: Tensor | None = None
) -> Evaluation:
    """The kernel of that name, one of `KERNELS`, at these factors.

    Args:
        kernel: Its name.
        out_factors: P `(pieces, out, columns)`.
        in_factors: Q `(pieces, in, columns)`.
        scale: Size of the distance kernel's coefficients.
        mixing: Of the mixture alone, alpha, gamma and beta `(3,)`.
    """
    if kernel == "distance":
        return DistanceEvaluation(out_factors, in_factors, scale)
    if mixing is not None:
        return MixtureEvaluation(out_factors, in_factors, scale, mixing)
    return LinearEvaluation(out_factors, in_factors)


def automatic_scale(in_features: int, rank: int, sparsity: float, layers: int, of_values: bool = False) -> float:
    """The distance kernel's coefficients: `240 / (in_features sqrt(rank layers (1 - sparsity)))`.

    So at rank 8 and sparsity 0.9 the 48 layers of a ViT with 12 blocks have 0.1 where they have 384 inputs. Where it
    comes from is in docs/what-snell-needs.md. Projections to attention's values have an eighth of it: attention
    averages them over the tokens, and what all tokens have in common, which an update grows along, is not averaged
    away.

    Args:
        in_features: Width of the layer's input.
        rank: Columns of the factors, over all pieces.
        sparsity: Fraction of the entries that loses, in [0, 1).
        layers: Number of layers that are adapted.
        of_values: Whether attention averages what the projection gives.
    """
    return (30 if of_values else 240) / (in_features * math.sqrt(rank * layers * (1 - sparsity)))


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
