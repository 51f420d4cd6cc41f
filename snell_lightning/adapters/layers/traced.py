"""The tuned product as an operation that compilers see: one node, whatever makes the update inside.

`torch.compile` traces a model into a graph of operations. What a tuned layer decides in Python, which engine makes the
update and how, must not be traced: it is inside `snell::tuned`, whose arguments say all of it, and in
`snell::tuned_backward`. Kept for backward are the layer's input, the factors and the thresholds, as without a compiler;
what else is kept of a model is the compiler's to choose.

The seed of dropout and drop path is a tensor there, so that the graph draws another one each time it is run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snell_lightning.adapters.layers.product import Plan, backward, forward, zeroes_samples
from snell_lightning.adapters.layers.recompute import Recipe
from snell_lightning.adapters.update.delta import SnellDelta
from snell_lightning.adapters.update.kernels import kernel_dtype
from snell_lightning.adapters.update.noise import Noise
from snell_lightning.adapters.update.rule import UpdateRule
from snell_lightning.adapters.update.shared import known_thresholds


def traced_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[SnellDelta],
    noise: tuple[float, float],
    order: Tensor | None,
    at_random: bool,
) -> Tensor:
    """`tuned_linear`, as an operation.

    Args:
        x: `(batch, ..., in)`, in the type to compute in.
        weight: As in `tuned_linear`.
        bias: As in `tuned_linear`.
        deltas: As in `tuned_linear`.
        noise: Probabilities of dropout and of drop path.
        order: As in `tuned_linear`.
        at_random: Whether a bf16 product is to be one, with the sum rounded at random.
    """
    first = deltas[0]
    seed = torch.randint(2**62, (), device=x.device) if any(noise) or at_random else None
    y, _ = torch.ops.snell.tuned(
        x.reshape(-1, x.shape[-1]),
        weight,
        bias,
        [delta.out_factors for delta in deltas],
        [delta.in_factors for delta in deltas],
        order,
        seed,
        first.config.kernel,
        first.config.sparsifier,
        [delta.scale for delta in deltas],
        [delta.sparsity for delta in deltas],
        noise,
        x.shape[0] if x.dim() > 1 else 1,
        at_random,
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def _rules(kernel: str, sparsifier: str, scales: Sequence[float], sparsities: Sequence[float]) -> list[UpdateRule]:
    return [UpdateRule(kernel, *each) for each in zip(scales, [sparsifier] * len(scales), sparsities, strict=True)]


def _in_turn(out_factors: Sequence[Tensor], in_factors: Sequence[Tensor]) -> list[Tensor]:
    return [factor for pair in zip(out_factors, in_factors, strict=True) for factor in pair]


@torch.library.custom_op("snell::tuned", mutates_args=())
def _tuned(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_factors: Sequence[Tensor],
    in_factors: Sequence[Tensor],
    order: Tensor | None,
    seed: Tensor | None,
    kernel: str,
    sparsifier: str,
    scales: Sequence[float],
    sparsities: Sequence[float],
    noise: Sequence[float],
    samples: int,
    at_random: bool,
) -> tuple[Tensor, Tensor]:
    factors = _in_turn(out_factors, in_factors)
    plan = _plan(x, factors, order, seed, kernel, sparsifier, scales, sparsities, noise, samples, at_random)
    y, taus = forward(plan, x, weight, bias, factors, known_thresholds(plan.rules, factors))
    # New ones: what an operation returns is nobody else's.
    return y, torch.cat([tau.flatten() for tau in taus]) if taus else x.new_empty(0, dtype=kernel_dtype(*factors, x))


@_tuned.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_factors: Sequence[Tensor],
    in_factors: Sequence[Tensor],
    order: Tensor | None,
    seed: Tensor | None,
    kernel: str,
    sparsifier: str,
    scales: Sequence[float],
    sparsities: Sequence[float],
    *others: Any,
) -> tuple[Tensor, Tensor]:
    count = sum(not rule.dense for rule in _rules(kernel, sparsifier, scales, sparsities))
    dtype = kernel_dtype(*out_factors, *in_factors, x)
    return x.new_empty(len(x), len(weight)), x.new_empty(count, dtype=dtype)


@torch.library.custom_op("snell::tuned_backward", mutates_args=())
def _tuned_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    out_factors: Sequence[Tensor],
    in_factors: Sequence[Tensor],
    taus: Tensor,
    order: Tensor | None,
    seed: Tensor | None,
    kernel: str,
    sparsifier: str,
    scales: Sequence[float],
    sparsities: Sequence[float],
    noise: Sequence[float],
    samples: int,
    at_random: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Tensor]:
    factors = _in_turn(out_factors, in_factors)
    plan = _plan(x, factors, order, seed, kernel, sparsifier, scales, sparsities, noise, samples, at_random)
    known = [taus] if len(taus) else []
    *given, grads = backward(plan, grad_y, x, weight, factors, known, need_x, need_weight, need_bias)
    # The factors' lie in one tensor, since what an operation returns must not overlap.
    return [
        *(x.new_empty(0) if grad is None else grad for grad in given),
        torch.cat([grad.flatten() for grad in grads]),
    ]


@_tuned_backward.register_fake
def _(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    out_factors: Sequence[Tensor],
    in_factors: Sequence[Tensor],
    *others: Any,
) -> list[Tensor]:
    need_x, need_weight, need_bias = others[-3:]
    return [
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(weight) if need_weight else x.new_empty(0),
        grad_y.new_empty(len(weight)) if need_bias else x.new_empty(0),
        out_factors[0].new_empty(sum(factor.numel() for factor in (*out_factors, *in_factors))),
    ]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, out_factors, in_factors, order, seed, *settings = inputs
    ctx.settings, ctx.count = settings, len(out_factors)
    ctx.save_for_backward(x, weight, output[1], order, seed, *out_factors, *in_factors)


def _gradients(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, weight, taus, order, seed, *factors = ctx.saved_tensors
    out_factors, in_factors = factors[: ctx.count], factors[ctx.count :]
    needs = ctx.needs_input_grad[:3]
    *given, flat = torch.ops.snell.tuned_backward(
        grad_y.contiguous(), x, weight, out_factors, in_factors, taus, order, seed, *ctx.settings, *needs
    )
    in_turn = _in_turn(out_factors, in_factors)
    parts = flat.split([factor.numel() for factor in in_turn])
    grads = [part.view(factor.shape) for part, factor in zip(parts, in_turn, strict=True)]
    of_inputs = [grad if need else None for grad, need in zip(given, needs, strict=True)]
    return *of_inputs, grads[::2], grads[1::2], *[None] * (2 + len(ctx.settings))


_tuned.register_autograd(_gradients, setup_context=_keep)


def _plan(
    x: Tensor,
    factors: Sequence[Tensor],
    order: Tensor | None,
    seed: Tensor | None,
    kernel: str,
    sparsifier: str,
    scales: Sequence[float],
    sparsities: Sequence[float],
    noise: Sequence[float],
    samples: int,
    at_random: bool,
) -> Plan:
    drawn = Noise(noise[0], noise[1], seed) if seed is not None and any(noise) else None
    rules = _rules(kernel, sparsifier, scales, sparsities)
    return Plan(rules, drawn, samples, Recipe(x.dtype), order, zeroes_samples(x, factors), seed if at_random else None)
