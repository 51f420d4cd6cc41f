"""How factors become an update: kernel and competition as one rule, whatever computes them.

`write` makes `base + factor * S(K(P, Q))` in a buffer; `backward` takes that matrix's gradient to the factors, and puts
the matrix in the gradient's place. Both work in tiles, without anything else of the matrix's size. The compiled loop
does it on the CPU where that can be had, torch's operations elsewhere; `stack.py` does so on a GPU, for several updates
at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from snell_lightning.adapters.update import loop
from snell_lightning.adapters.update.competition import (
    shrink_,
    survivor_slopes,
    survivor_values_,
    survivors_rank,
    threshold,
    tiles,
)
from snell_lightning.adapters.update.kernels import evaluate


@dataclass(frozen=True)
class UpdateRule:
    """How factors become an update: the kernel, the sparsifier and the sparsity in force."""

    kernel: str
    scale: float
    sparsifier: str
    sparsity: float
    # Of the mixture alone, alpha, gamma and beta `(3,)`.
    mixing: Tensor | None = field(default=None, compare=False)

    @property
    def dense(self) -> bool:
        """Whether every entry takes part: no sparsifier, or nothing to drop."""
        return self.sparsifier == "none" or self.sparsity == 0

    def rank(self, out_factors: Tensor, in_factors: Tensor) -> int:
        """The rank of the threshold among the absolute values, from 1 for the smallest."""
        return survivors_rank(out_factors.shape[1] * in_factors.shape[1], self.sparsity)

    def write(
        self, out_factors: Tensor, in_factors: Tensor, buffer: Tensor, base: Tensor | None = None, factor: float = 1.0
    ) -> Tensor | None:
        """Write `base + factor * update` to `buffer`.

        Args:
            out_factors: P.
            in_factors: Q.
            buffer: `(out, in)`, in the type of the factors.
            base: `(out, in)` of any type; zero by default.
            factor: What the update is multiplied with.

        Returns:
            The threshold; None where the update is dense.
        """
        if loop.applies(self.kernel, out_factors, in_factors, base):
            kind, sparsity = ("none", None) if self.dense else (self.sparsifier, self.sparsity)
            return loop.write(out_factors, in_factors, self.scale, kind, sparsity, buffer, base, factor)
        evaluation = evaluate(self.kernel, out_factors, in_factors, self.scale, self.mixing)
        for rows in tiles(buffer):
            evaluation.fill(rows, buffer[rows])
        tau = None if self.dense else threshold(buffer, self.sparsity)
        if tau is not None or base is not None or factor != 1:
            scratch = buffer.new_empty(0)
            for rows in tiles(buffer):
                tile = buffer[rows]
                if tau is not None:
                    survivor_values_(shrink_(tile, tau), tau, self.sparsifier, scratch.resize_(tile.shape))
                _put(tile, tile, None if base is None else base[rows], factor)
        return tau

    def backward(
        self,
        out_factors: Tensor,
        in_factors: Tensor,
        tau: Tensor | None,
        grad: Tensor,
        base: Tensor | None = None,
        factor: float = 1.0,
        rewrite: bool = True,
    ) -> tuple[Tensor, ...]:
        """Gradients of both factors, and of the mixture's scalars, from that of what `write` wrote.

        What `write` wrote is put in the gradient's place.

        Args:
            out_factors: P.
            in_factors: Q.
            tau: The threshold.
            grad: `(out, in)` in the products' type; overwritten with `base + factor * update` if `rewrite` is true.
            base: As in `write`.
            factor: As in `write`.
            rewrite: Whether the update is wanted.
        """
        if loop.applies(self.kernel, out_factors, in_factors, base, grad):
            kind = "none" if tau is None else self.sparsifier
            return loop.backward(out_factors, in_factors, self.scale, kind, tau, grad, base, factor, rewrite)
        evaluation = evaluate(self.kernel, out_factors, in_factors, self.scale, self.mixing)
        buffers = out_factors.new_empty(0), out_factors.new_empty(0)
        for rows in tiles(grad):
            tile, scratch = (buffer.resize_(grad[rows].shape) for buffer in buffers)
            evaluation.fill(rows, tile)
            if tau is None:
                scratch.copy_(grad[rows])
            else:
                survivor_slopes(shrink_(tile, tau), tau, self.sparsifier, out=scratch).mul_(grad[rows])
            evaluation.accumulate(rows, scratch)
            if rewrite:
                if tau is not None:
                    survivor_values_(tile, tau, self.sparsifier, scratch)
                _put(grad[rows], tile, None if base is None else base[rows], factor)
        return tuple(grad.mul_(factor) for grad in evaluation.gradients())

    def samples(self, out_factors: Tensor, in_factors: Tensor, tau: Tensor | None, *others: Tensor) -> bool:
        """Whether `sampled_backward` can be had, and is cheaper than a product and `backward`.

        Args:
            out_factors: P.
            in_factors: Q.
            tau: The threshold.
            others: The matrices that are read along the way.
        """
        if tau is None or self.sparsity < loop.SPARSE:
            return False
        return loop.applies(self.kernel, out_factors, in_factors, *others) and not loop.ties(tau)

    def sampled_backward(
        self,
        out_factors: Tensor,
        in_factors: Tensor,
        tau: Tensor,
        grad_y: Tensor,
        x: Tensor,
        ranges: Sequence[slice],
        out: Tensor | None,
        base: Tensor | None = None,
        factor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of both factors from that of the product, which is needed where there are survivors only.

        Args:
            out_factors: P.
            in_factors: Q.
            tau: The threshold.
            grad_y: Gradient of the product `(rows, out)`.
            x: What the update was multiplied with, `(rows, in)` of the same type.
            ranges: Rows to sum over.
            out: `(out, in)`, where `base + factor * update` is written; None if that is not wanted.
            base: As in `write`.
            factor: As in `write`.
        """
        return loop.sampled_backward(
            out_factors,
            in_factors,
            self.scale,
            self.sparsifier,
            self.sparsity,
            tau,
            grad_y,
            x,
            ranges,
            out,
            base,
            factor,
        )


def _put(target: Tensor, values: Tensor, base: Tensor | None, factor: float) -> None:
    """Write `base + factor * values` to `target`, rounded once; `values` may be overwritten."""
    if base is None:
        target.copy_(values if factor == 1 else values.mul_(factor))
    elif target.dtype == values.dtype == base.dtype:
        torch.add(base, values, alpha=factor, out=target)
    else:
        target.copy_(torch.add(base, values, alpha=factor))
