"""The updates of one layer together: in one launch where the engine can, one after the other where it cannot.

A fused projection has several updates, one for each of its slices; their rows lie one below the other in the weight,
or where an order says.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from snell_lightning.adapters.update import triton
from snell_lightning.adapters.update.kernels import kernel_dtype
from snell_lightning.adapters.update.rounding import round_at_random
from snell_lightning.adapters.update.rule import UpdateRule


@dataclass(frozen=True)
class Stack:
    """Updates of equal width whose rows make up a weight.

    Attributes:
        rules: How each update is made.
        factors: P and Q of each in turn; behind them, of the mixture kernel, alpha, gamma and beta `(3,)` of each.
        order: `(out,)`, the row of the weight that each of their rows belongs to; None where they are in turn.
    """

    rules: Sequence[UpdateRule]
    factors: Sequence[Tensor]
    order: Tensor | None = None

    def together(self, *others: Tensor) -> bool:
        """Whether one launch serves all, if these are the matrices that it reads and writes."""
        first = self.rules[0]
        alike = all((rule.kernel, rule.dense) == (first.kernel, first.dense) for rule in self.rules)
        alike = alike and first.kernel in triton.KERNELS
        return alike and triton.applies(*self.factors) and all(other.dtype in triton.TYPES for other in others)

    def write(
        self, out: Tensor, base: Tensor | None, factor: float, taus: Tensor | None, seed: Tensor | int | None = None
    ) -> list[Tensor]:
        """Write `base + factor * update` to `out`.

        Args:
            out: `(out, in)`, contiguous. Of a lower precision than the kernel's only where all are made together.
            base: `(out, in)` of any type; None for zero.
            factor: What the update is multiplied with.
            taus: The thresholds, if they are known: `(updates,)`, where all are made together.
            seed: Of the numbers by which the result is rounded to bf16 at random; None rounds to the nearest.

        Returns:
            Thresholds that reproduce the same update.
        """
        if self.together(out, *_given(base)):
            return self._write_together(out, base, factor, taus, seed)
        found = []
        target = out if seed is None else torch.empty_like(out, dtype=kernel_dtype(*self.factors))
        for rule, p, q, rows in self._each(target.dtype):
            part = target[rows]
            found.append(rule.write(p, q, part, None if base is None else base[rows], factor))
            _put_back(target, rows, part)
        if seed is not None:
            out.copy_(round_at_random(target, seed))
        return [tau for tau in found if tau is not None]

    def backward(
        self, taus: Sequence[Tensor], grad: Tensor, base: Tensor | None, factor: float, rewrite: bool
    ) -> list[Tensor]:
        """The factors' gradients from that of what `write` wrote, which is put in the gradient's place.

        Args:
            taus: What `write` returned.
            grad: `(out, in)`, contiguous; overwritten with `base + factor * update` if `rewrite` is true.
            base: As in `write`.
            factor: As in `write`.
            rewrite: Whether the update is wanted.

        Returns:
            Gradients of the factors, in their order.
        """
        if self.together(grad, *_given(base)):
            flat = torch.ops.snell.backward_all(*self._settings, _as_one(taus), grad, base, self.order, factor, rewrite)
            parts = flat.split([each.numel() for each in self.factors])
            return [part.view(each.shape) for part, each in zip(parts, self.factors, strict=True)]
        grads: list[Tensor] = []
        of_mixing: list[Tensor] = []
        for (rule, p, q, rows), tau in zip(
            self._each(kernel_dtype(*self.factors, grad)), self._each_tau(taus), strict=True
        ):
            part = grad[rows]
            of_p, of_q, *rest = rule.backward(p, q, tau, part, None if base is None else base[rows], factor, rewrite)
            grads += [of_p, of_q]
            of_mixing += rest
            if rewrite:
                _put_back(grad, rows, part)
        return grads + of_mixing

    def samples(self, taus: Sequence[Tensor], *others: Tensor) -> bool:
        """Whether `sampled_backward` can be had, and is cheaper than a product and `backward`.

        Args:
            taus: What `write` returned.
            others: The matrices that are read along the way.
        """
        if self.together(*others):
            return False
        each = zip(self._each(kernel_dtype(*self.factors)), self._each_tau(taus), strict=True)
        return all(rule.samples(p, q, tau, *others) for (rule, p, q, _), tau in each)

    def sampled_backward(
        self,
        taus: Sequence[Tensor],
        grad_y: Tensor,
        x: Tensor,
        ranges: Sequence[slice],
        out: Tensor | None,
        base: Tensor | None,
        factor: float,
    ) -> list[Tensor]:
        """The factors' gradients from that of the product, which is needed where there are survivors only.

        Args:
            taus: What `write` returned.
            grad_y: Gradient of the product `(rows, out)`.
            x: What the update was multiplied with, `(rows, in)` of the same type.
            ranges: Rows to sum over.
            out: `(out, in)`, where `base + factor * update` is written; None if that is not wanted.
            base: As in `write`.
            factor: As in `write`.
        """
        grads: list[Tensor] = []
        each = zip(self._each(kernel_dtype(*self.factors)), self._each_tau(taus), strict=True)
        for (rule, p, q, rows), tau in each:
            assert tau is not None
            part = None if out is None else out[rows]
            of_base = None if base is None else base[rows]
            grads += rule.sampled_backward(p, q, tau, grad_y[:, rows], x, ranges, part, of_base, factor)
            if out is not None and part is not None:
                _put_back(out, rows, part)
        return grads

    def _each_tau(self, taus: Sequence[Tensor]) -> list[Tensor | None]:
        """The threshold of each update, None of a dense one, from what `write` returned."""
        left = iter(taus[0].unbind() if len(taus) == 1 and taus[0].dim() else taus)
        return [None if rule.dense else next(left) for rule in self.rules]

    @property
    def _settings(self) -> tuple[list[Tensor], list[Tensor], str, str, list[float]]:
        rule, scales = self.rules[0], [rule.scale for rule in self.rules]
        kind = "none" if rule.dense else rule.sparsifier
        return list(self.factors[::2]), list(self.factors[1::2]), rule.kernel, kind, scales

    def _write_together(
        self, out: Tensor, base: Tensor | None, factor: float, taus: Tensor | None, seed: Tensor | int | None
    ) -> list[Tensor]:
        if taus is None and not self.rules[0].dense:
            taus = thresholds(self.rules, self.factors)
        seeds = (seed, None) if isinstance(seed, Tensor) else (None, seed)
        torch.ops.snell.write_all(*self._settings, taus, out, base, self.order, factor, *seeds)
        return _given(taus)

    def _each(self, dtype: torch.dtype) -> Iterator[tuple[UpdateRule, Tensor, Tensor, slice | Tensor]]:
        """Each update's rule, P and Q in the kernel's precision, and its rows of the weight."""
        start, count = 0, 2 * len(self.rules)
        pairs, mixings = self.factors[:count], self.factors[count:]
        rules = [replace(rule, mixing=each.to(dtype)) for rule, each in zip(self.rules, mixings, strict=False)]
        for rule, p, q in zip(rules or self.rules, pairs[::2], pairs[1::2], strict=True):
            below = slice(start, start + p.shape[1])
            start = below.stop
            yield rule, p.to(dtype), q.to(dtype), below if self.order is None else self.order[below]


def thresholds(rules: Sequence[UpdateRule], factors: Sequence[Tensor]) -> Tensor:
    """The thresholds of updates of any shapes, `(updates,)`, in a fixed number of launches.

    Args:
        rules: Of each update: alike but for scale and sparsity, and none of them dense.
        factors: P and Q of each in turn, of equal types and numbers of pieces.
    """
    ranks = [rule.rank(p, q) for rule, p, q in zip(rules, factors[::2], factors[1::2], strict=True)]
    scales = [rule.scale for rule in rules]
    return torch.ops.snell.thresholds(list(factors[::2]), list(factors[1::2]), rules[0].kernel, scales, ranks)


def _as_one(taus: Sequence[Tensor]) -> Tensor | None:
    """Thresholds `(updates,)` from what `write` returned."""
    if not taus:
        return None
    return taus[0] if taus[0].dim() else torch.stack(list(taus))


def _given(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


def _put_back(matrix: Tensor, rows: slice | Tensor, part: Tensor) -> None:
    """Write rows that were taken out of a matrix; those that lie together are a view of it."""
    if not isinstance(rows, slice):
        matrix[rows] = part
