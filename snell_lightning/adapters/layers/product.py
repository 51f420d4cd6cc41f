"""The product with a tuned weight, which keeps nothing of the weight's size for backward.

    x ──────────────> x W^T ──────────────────────(+)──> y
     └─ dropout ────> x dW^T ─────── drop path ────┘
                        ^
        dW = S(K(P, Q)) │     kernel and competition, in fp32, made anew whenever needed
                P, Q ───┘     the only trainable tensors

Kept for backward are x (or what x can be made from again, see `recompute.py`), P, Q and one threshold per update:
neither K, nor its mask, nor dW, nor a noise mask (a seed rebuilds those). Forward and backward each hold one matrix of
the weight's size, the buffer in which K becomes W + dW, or in which the gradient of dW becomes W + dW; everything else
is made in tiles.

Where products are exact fp32 and no entry is dropped, `x (W + dW)^T` is one product. Otherwise there are two, because
adding an update of 1e-5 to a bf16 weight of 0.03 (spacing 1e-4) would lose it. Of that, only the input's gradient in
backward uses the sum: what is lost there is within the rounding of the low precision itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from snell_lightning.adapters.layers.recompute import Recipe
from snell_lightning.adapters.update import triton
from snell_lightning.adapters.update.delta import SnellDelta, operands
from snell_lightning.adapters.update.kernels import full_precision, kernel_dtype
from snell_lightning.adapters.update.noise import Noise
from snell_lightning.adapters.update.rule import UpdateRule
from snell_lightning.adapters.update.stack import Stack

# A low-precision copy of dW is brought to this size first where the type's range is short (fp16).
_FP16_UPDATE_PEAK = 2.0**-4


@dataclass(frozen=True)
class Plan:
    """What the forward of a tuned layer decides and its backward follows; of tensors only the numbers of rows.

    Attributes:
        rules: How each update is made.
        noise: Dropout and drop path, or None.
        samples: Number of samples that the rows belong to.
        recipe: How x is made from what is kept of it.
        order: Rows of the weight that the updates' rows belong to; by default one below the other.
        seed: Of the numbers by which `W + dW` is rounded to bf16 at random, for one product where two are used
            otherwise; None uses two.
        masked: Whether dropped samples are zeroed. Otherwise products leave their rows out, which takes one for each
            run of kept samples, and their numbers on the host.
    """

    rules: list[UpdateRule]
    noise: Noise | None
    samples: int
    recipe: Recipe
    order: Tensor | None = None
    masked: bool = False
    seed: Tensor | int | None = None

    @property
    def scale(self) -> float:
        """What the updates are multiplied with."""
        return self.noise.scale if self.noise else 1.0

    def row_ranges(self, rows: int) -> tuple[list[slice], list[slice]]:
        """Rows of kept samples, and of those that the products leave out."""
        if self.noise is None or self.masked:
            return [slice(0, rows)], []
        return self.noise.row_ranges(rows, self.samples)

    def dropped(self, x: Tensor) -> Tensor | None:
        """Where the updates' input `x (rows, in)` is zero, a mask of its entries or rows; None where nowhere."""
        if self.noise is None:
            return None
        if self.masked:
            return self.noise.dropped(len(x), x.shape[1], self.samples, x.device)
        return self.noise.dropped_entries(len(x), x.shape[1], x.device)


def tuned_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[SnellDelta],
    noise: Noise | None = None,
    kept: Tensor | None = None,
    recipe: Recipe | None = None,
    order: Tensor | None = None,
    taus: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """`x (W + dW)^T + b`, where the rows of dW are those of `deltas`.

    Args:
        x: `(batch, ..., in)`, in the type to compute in.
        weight: Frozen `(out, in)`, in the type of x or a lower one.
        bias: Frozen `(out,)` or None.
        deltas: Updates of equal width whose heights sum to `out`.
        noise: Dropout and drop path of the update, or None.
        kept: What is kept for backward; by default x.
        recipe: How x is made from that, if it is not x; both come from `layer_input`.
        order: Rows of the weight that the updates' rows belong to; by default one below the other.
        taus: The updates' thresholds, where they are known.
        seed: Of random rounding, where a bf16 product is to be one.

    Returns:
        `(batch, ..., out)` in the type of x.
    """
    factors = operands(deltas)
    samples = len(x) if x.dim() > 1 else 1
    rules, masked = [delta.rule for delta in deltas], zeroes_samples(x, factors)
    plan = Plan(rules, noise, samples, recipe or Recipe(x.dtype), order, masked, seed)
    y = _TunedLinear.apply(x, x.detach() if kept is None else kept, weight, bias, plan, taus, *factors)
    return y.view(*x.shape[:-1], y.shape[-1])


def zeroes_samples(x: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether samples that drop path drops are zeroed, and their rows not left out: where the host is not to wait."""
    return x.device.type != "cpu" or triton.applies(*factors)


def make_matrix(
    deltas: Sequence[SnellDelta],
    shape: torch.Size,
    dtype: torch.dtype,
    base: Tensor | None,
    order: Tensor | None,
    taus: Tensor | None,
) -> Tensor:
    """`base + dW (out, in)`, without a gradient.

    Args:
        deltas: As in `tuned_linear`.
        shape: That of the weight.
        dtype: Type of the result.
        base: `(out, in)`, or None for zero.
        order: As in `tuned_linear`.
        taus: As in `tuned_linear`.
    """
    factors = [factor.detach() for factor in operands(deltas)]
    stack = Stack([delta.rule for delta in deltas], factors, order)
    made = factors[0].new_empty(shape, dtype=dtype)
    if not stack.together(made):
        made = factors[0].new_empty(shape, dtype=kernel_dtype(*factors, made))
    stack.write(made, base, 1.0, taus)
    return made.to(dtype)


def one_product_is_exact(x: Tensor, weight: Tensor) -> bool:
    """Whether a product with `W + dW` keeps the update: only where products round no more than fp32 does."""
    if weight.dtype.itemsize > x.dtype.itemsize:
        return False
    return x.dtype == torch.float64 or (x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest")


def two_products(
    x: Tensor,
    update: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Tensor | None = None,
    kept: Sequence[slice] = (slice(None),),
    dropped: Sequence[slice] = (),
) -> Tensor:
    """`x dW^T + x W^T + b`, in the type of x, where the update's product leaves out dropped entries and samples.

    The update comes first, so that the sum is rounded once: added to a product that is rounded already, an update below
    half the spacing would always be lost; this way it survives on average.

    Args:
        x: `(rows, in)`.
        update: `(out, in)` in fp32, or in the type of x if that is bf16.
        weight: `(out, in)`.
        bias: `(out,)` or None.
        entries: Mask of the entries or rows of x that the update does not see, or None.
        kept: Ranges of rows that the update sees.
        dropped: The other rows.
    """
    noisy_x = x if entries is None else x.masked_fill(entries, 0.0)
    update, factor = _representable(update, x.dtype)
    y = x.new_empty(len(x), len(update))
    for rows in kept:
        torch.mm(noisy_x[rows], update.T, out=y[rows])
    for rows in dropped:
        y[rows] = 0.0
    if factor is not None:
        y = y.to(factor.dtype).div_(factor).to(y.dtype)
    y.addmm_(x, weight.to(x.dtype).T)
    return y if bias is None else y.add_(bias.to(x.dtype))


class _TunedLinear(torch.autograd.Function):
    """The tuned product. Inputs: x, what is kept of it, weight, bias, plan, thresholds, then the updates' factors.

    The output is `(rows, out)` whatever the leading dimensions of x are: a view made in here could not be modified in
    place by what follows, as activation functions do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: Plan,
        known: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        y, taus = forward(plan, x.reshape(-1, x.shape[-1]), weight, bias, factors, known)
        ctx.plan, ctx.count = plan, len(factors)
        ctx.save_for_backward(kept, weight, *factors, *taus)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, *rest = ctx.saved_tensors
        count = ctx.count
        needs = ctx.needs_input_grad
        grad_x, grad_weight, grad_bias, grads = backward(
            ctx.plan, grad_y, kept, weight, rest[:count], rest[count:], needs[0], needs[2], needs[3]
        )
        return grad_x, None, grad_weight, grad_bias, None, None, *grads


def forward(
    plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Tensor], known: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """The tuned product, and the thresholds that its backward needs.

    Args:
        plan: What is decided.
        x: `(rows, in)`.
        weight: `(out, in)`.
        bias: `(out,)` or None.
        factors: Of the updates, from `operands`.
        known: The thresholds, where they are known.
    """
    kept_rows, dropped_rows = plan.row_ranges(len(x))
    entries = plan.dropped(x)
    seed = plan.seed if entries is None and x.dtype == torch.bfloat16 else None
    one_product = entries is None and (seed is not None or one_product_is_exact(x, weight))

    stack = Stack(plan.rules, factors, plan.order)
    buffer = x.new_empty(weight.shape, dtype=_type_of_update(stack, x) if seed is None else x.dtype)
    with full_precision(x.device.type):
        taus = stack.write(buffer, weight if one_product else None, plan.scale, known, seed)
    with torch.autocast(x.device.type, enabled=False):
        if one_product:
            bias = None if bias is None else bias.to(x.dtype)
            y = F.linear(x, buffer, bias)
            for rows in dropped_rows:
                y[rows] = F.linear(x[rows], weight.to(x.dtype), bias)
        else:
            y = two_products(x, buffer, weight, bias, entries, kept_rows, dropped_rows)
    return y, taus


def backward(
    plan: Plan,
    grad_y: Tensor,
    kept: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor],
    taus: Sequence[Tensor],
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients of x, weight, bias (None where they are not needed) and of the factors.

    Args:
        plan: As in `forward`.
        grad_y: `(rows, out)`.
        kept: What x is made from.
        weight: As in `forward`.
        factors: As in `forward`.
        taus: What `forward` returned.
        need_x: Whether the gradient of x is needed.
        need_weight: Whether that of the weight is.
        need_bias: Whether that of the bias is.
    """
    stack = Stack(plan.rules, factors, plan.order)
    x = plan.recipe.rebuild(kept)
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    kept_rows, dropped_rows = plan.row_ranges(len(x))
    grad_weight = grad_bias = None
    with torch.autocast(x.device.type, enabled=False):
        if need_weight:
            grad_weight = (grad_y.T @ x).to(weight.dtype)
        if need_bias:
            grad_bias = grad_y.sum(0)
        entries = plan.dropped(x)
        x = x if entries is None else x.masked_fill(entries, 0.0)
    # What grad_y is multiplied with, W + dW, comes into the place of the update's gradient.
    base = weight if entries is None else None
    if stack.samples(taus, grad_y, x, weight):
        buffer = grad_y.new_empty(weight.shape if need_x else 0)
        out = buffer if need_x else None
        grads = stack.sampled_backward(taus, grad_y, x, kept_rows, out, base, plan.scale)
    else:
        with torch.autocast(x.device.type, enabled=False):
            buffer = _product_over(kept_rows, grad_y, x)
        if buffer.dtype == torch.float16:
            # An update may be too small for this type; what is written over the gradient is.
            buffer = buffer.float()
        del x
        with full_precision(grad_y.device.type):
            grads = stack.backward(taus, buffer, base, plan.scale, rewrite=need_x)
    grads = [grad.to(factors[0].dtype) for grad in grads]

    grad_x = None
    if need_x:
        with torch.autocast(grad_y.device.type, enabled=False):
            if entries is None:
                grad_x = grad_y @ buffer.to(grad_y.dtype)
                for rows in dropped_rows:
                    grad_x[rows] = grad_y[rows] @ weight.to(grad_y.dtype)
            else:
                update, factor = _representable(buffer, grad_y.dtype)
                grad_x = grad_y.new_empty(len(grad_y), weight.shape[1])
                for rows in kept_rows:
                    torch.mm(grad_y[rows], update, out=grad_x[rows])
                for rows in dropped_rows:
                    grad_x[rows] = 0.0
                if factor is not None:
                    grad_x = grad_x.to(factor.dtype).div_(factor).to(grad_x.dtype)
                grad_x.masked_fill_(entries, 0.0).addmm_(grad_y, weight.to(grad_y.dtype))
            grad_x = grad_x.view(shape)
    return grad_x, grad_weight, grad_bias, grads


def _type_of_update(stack: Stack, x: Tensor) -> torch.dtype:
    """The type that an update is made in: that of the product, where it may be rounded to that at once."""
    if x.dtype == torch.bfloat16 and stack.together(x):
        return x.dtype
    return kernel_dtype(*stack.factors, x)


def _product_over(ranges: Sequence[slice], grad_y: Tensor, x: Tensor) -> Tensor:
    """`grad_y^T x (out, in)` over these ranges of rows."""
    if not ranges:
        return grad_y.new_zeros(grad_y.shape[1], x.shape[1])
    product = grad_y[ranges[0]].T @ x[ranges[0]]
    for rows in ranges[1:]:
        product.addmm_(grad_y[rows].T, x[rows])
    return product


def _representable(update: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """An update in a type; in fp16 multiplied with a power of two, returned too, or its entries would underflow."""
    if dtype != torch.float16:
        return update.to(dtype), None
    peak = update.abs().amax().clamp(min=torch.finfo(update.dtype).tiny)
    factor = torch.exp2(torch.floor(torch.log2(_FP16_UPDATE_PEAK / peak)))
    return (update * factor).to(dtype), factor
