"""The update of one weight matrix, and the product with it that keeps nothing of the matrix's size.

    x ──────────────> x W^T ──────────────────────(+)──> y
     └─ dropout ────> x dW^T ─────── drop path ────┘
                        ^
        dW = S(K(P, Q)) │     kernel and competition, in fp32, made anew whenever needed
                P, Q ───┘     the only trainable tensors

Kept for backward are x, P, Q and one threshold per update: neither K, nor its mask, nor dW, nor a noise mask (a seed
rebuilds those). Where there is no noise and products are exact fp32, `x (W + dW)^T` is one product. Otherwise there are
two, because adding an update of 1e-5 to a bf16 weight of 0.03 (spacing 1e-4) would lose it. Of that, only the input's
gradient in backward uses the sum: what is lost there is within the rounding of the low precision itself.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from snell_lightning.adapters.competition import survivor_slopes, survivors, threshold
from snell_lightning.adapters.config import SnellConfig, check_fraction
from snell_lightning.adapters.kernels import Kernel, full_precision, kernel_dtype, make_kernel

# A low-precision copy of dW is brought to this size first where the type's range is short (fp16).
_FP16_UPDATE_PEAK = 2.0**-4


@dataclass(frozen=True)
class UpdateRule:
    """How factors become an update: the kernel, the sparsifier and the sparsity in force."""

    kernel: Kernel
    sparsifier: str
    sparsity: float

    @property
    def dense(self) -> bool:
        """Whether every entry takes part: no sparsifier, or nothing to drop."""
        return self.sparsifier == "none" or self.sparsity == 0

    def update(self, out_factors: Tensor, in_factors: Tensor) -> tuple[Tensor, Tensor | None]:
        """The update `(out, in)` and its threshold, `None` where the update is dense."""
        matrix, _ = self.kernel.evaluate(out_factors, in_factors)
        if self.dense:
            return matrix, None
        tau = threshold(matrix, self.sparsity)
        return survivors(matrix, tau, self.sparsifier), tau

    def backward(
        self, out_factors: Tensor, in_factors: Tensor, tau: Tensor | None, grad: Tensor, need_update: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of the factors from `grad (out, in)`, the update's gradient, and the update again if asked for."""
        matrix, parts = self.kernel.evaluate(out_factors, in_factors)
        if tau is None:
            update: Tensor | None = matrix
        else:
            update = survivors(matrix, tau, self.sparsifier) if need_update else None
            grad = survivor_slopes(matrix, tau, self.sparsifier).mul_(grad)
        grad_out, grad_in = self.kernel.gradients(out_factors, in_factors, parts, grad)
        return grad_out, grad_in, update if need_update else None


class SnellDelta(nn.Module):
    """A trainable, sparse update of a weight matrix `(out_features, in_features)`.

    Both factors start Kaiming-uniform with a = sqrt(5) over the whole tensor, as in the released code: uniform within
    `1 / sqrt(features * rank / pieces)`.

    Args:
        in_features: Columns of the matrix.
        out_features: Rows of the matrix.
        config: Rank, sparsity, kernel, sparsifier, pieces and scale.
        device: Where the factors live.
        dtype: Type of the factors; fp32 unless there is a reason.

    Attributes:
        in_factors: Parameter `(pieces, in_features, rank / pieces)`.
        out_factors: Parameter `(pieces, out_features, rank / pieces)`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: SnellConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.config = config
        columns = config.rank // config.pieces
        self.in_factors = nn.Parameter(torch.empty(config.pieces, in_features, columns, device=device, dtype=dtype))
        self.out_factors = nn.Parameter(torch.empty(config.pieces, out_features, columns, device=device, dtype=dtype))
        self._kernel = make_kernel(config.kernel, config.pieces, config.scale)
        self.sparsity = config.sparsity
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both factors anew."""
        for factors in (self.in_factors, self.out_factors):
            nn.init.kaiming_uniform_(factors, a=math.sqrt(5))

    @property
    def sparsity(self) -> float:
        """Fraction of the entries that loses the competition, in [0, 1); may be set while training."""
        return self._sparsity

    @sparsity.setter
    def sparsity(self, value: float) -> None:
        check_fraction("sparsity", value)
        self._sparsity = float(value)

    @property
    def rule(self) -> UpdateRule:
        """How the factors become the update, at the sparsity in force."""
        return UpdateRule(self._kernel, self.config.sparsifier, self._sparsity)

    def weight(self) -> Tensor:
        """The update as applied, `(out_features, in_features)` in fp32; differentiable."""
        return _Update.apply(self.out_factors, self.in_factors, self.rule)

    def adapter_params(self) -> list[str]:
        """Names of this module's own parameters that belong to the adapter."""
        return ["in_factors", "out_factors"]

    def extra_repr(self) -> str:
        """Sizes and settings, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.config.rank}, "
            f"sparsity={self.sparsity:g}, kernel={self.config.kernel}, sparsifier={self.config.sparsifier}"
        )


@dataclass(frozen=True)
class Noise:
    """Regularisation of an update during training: nothing but probabilities and a seed is stored.

    Attributes:
        dropout: Probability of dropping an entry of the update's input.
        drop_path: Probability of dropping a sample's whole update.
        seed: Rebuilds both masks in backward.
    """

    dropout: float
    drop_path: float
    seed: int

    @classmethod
    def draw(cls, dropout: float, drop_path: float) -> "Noise | None":
        """Noise for one forward, seeded from the main generator on the CPU; `None` where both probabilities are 0."""
        if not dropout and not drop_path:
            return None
        return cls(dropout, drop_path, int(torch.randint(2**63 - 1, ()).item()))

    def masks(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Masks of mean 1 for `x`, seen as `rows` vectors: entries `(rows, in)`, samples `(rows, 1)`."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        entries = samples = None
        rows = x.numel() // x.shape[-1]
        if self.drop_path:
            count = len(x) if x.dim() > 1 else 1
            kept = _keep_mask(x.new_empty(count, 1), self.drop_path, generator)
            samples = kept.repeat_interleave(rows // max(count, 1), dim=0)
        if self.dropout:
            entries = _keep_mask(x.new_empty(rows, x.shape[-1]), self.dropout, generator)
        return entries, samples


def _keep_mask(empty: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    return empty.bernoulli_(1 - probability, generator=generator).div_(1 - probability)


def tuned_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, deltas: Sequence[SnellDelta], noise: Noise | None = None
) -> Tensor:
    """`x (W + dW)^T + b`, where the rows of dW are those of `deltas`, one below the other.

    Args:
        x: `(batch, ..., in)`, in the type to compute in.
        weight: Frozen `(out, in)`.
        bias: Frozen `(out,)` or None.
        deltas: Updates of equal width whose heights sum to `out`.
        noise: Dropout and drop path of the update, or None.

    Returns:
        `(batch, ..., out)` in the type of `x`.
    """
    factors = [factor for delta in deltas for factor in (delta.out_factors, delta.in_factors)]
    y = _TunedLinear.apply(x, weight, bias, [delta.rule for delta in deltas], noise, *factors)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Update(torch.autograd.Function):
    """Factors to update, with the closed-form gradient and nothing kept but factors and threshold."""

    @staticmethod
    def forward(ctx: Any, out_factors: Tensor, in_factors: Tensor, rule: UpdateRule) -> Tensor:
        dtype = kernel_dtype(out_factors, in_factors)
        with full_precision(out_factors.device.type):
            update, tau = rule.update(out_factors.to(dtype), in_factors.to(dtype))
        ctx.rule = rule
        ctx.save_for_backward(out_factors, in_factors, tau)
        return update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        out_factors, in_factors, tau = ctx.saved_tensors
        grad_out, grad_in, _ = _factor_gradients(ctx.rule, out_factors, in_factors, tau, grad, need_update=False)
        return grad_out, grad_in, None


class _TunedLinear(torch.autograd.Function):
    """The tuned product. Inputs: x, weight, bias, rules, noise, then out and in factors of each update in turn.

    The output is `(rows, out)` whatever the leading dimensions of `x` are: a view made in here could not be modified in
    place by what follows, as activation functions do.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rules: list[UpdateRule],
        noise: Noise | None,
        *factors: Tensor,
    ) -> Tensor:
        updates, taus = [], []
        with full_precision(x.device.type):
            for rule, out_factors, in_factors in zip(rules, factors[::2], factors[1::2], strict=True):
                dtype = kernel_dtype(out_factors, in_factors)
                update, tau = rule.update(out_factors.to(dtype), in_factors.to(dtype))
                updates.append(update)
                taus.append(tau)
        with torch.autocast(x.device.type, enabled=False):
            update = updates[0] if len(updates) == 1 else torch.cat(updates)
            bias = None if bias is None else bias.to(x.dtype)
            tall_x = x.reshape(-1, x.shape[-1])
            if noise is None and _merged_is_exact(x, weight):
                y = F.linear(tall_x, update.add_(weight) if update.dtype == weight.dtype else weight + update, bias)
            else:
                entries, samples = noise.masks(x) if noise else (None, None)
                y = _low_precision_linear(tall_x if entries is None else tall_x * entries, update)
                if samples is not None:
                    y *= samples
                # The update comes first, so that the sum is rounded once: added to a product that is rounded already,
                # an update below half the spacing would always be lost; this way it survives on average.
                y.addmm_(tall_x, weight.to(x.dtype).T)
                if bias is not None:
                    y += bias
        ctx.rules, ctx.noise = rules, noise
        ctx.save_for_backward(x, weight, *factors, *taus)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.rules)
        x, weight, *rest = ctx.saved_tensors
        factors, taus = rest[: 2 * count], rest[2 * count :]
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        noise: Noise | None = ctx.noise

        with torch.autocast(x.device.type, enabled=False):
            entries, samples = noise.masks(x) if noise else (None, None)
            tall_x = x.reshape(-1, x.shape[-1])
            noisy_x = tall_x if entries is None else tall_x * entries
            noisy_grad = grad_y if samples is None else grad_y * samples

            grads: list[Tensor | None] = []
            updates: list[Tensor] = []
            row = 0
            for rule, out_factors, in_factors, tau in zip(ctx.rules, factors[::2], factors[1::2], taus, strict=True):
                rows = out_factors.shape[1]
                grad_update = noisy_grad[:, row : row + rows].T @ noisy_x
                row += rows
                grad_out, grad_in, update = _factor_gradients(
                    rule, out_factors, in_factors, tau, grad_update, need_update=need_x
                )
                grads += [grad_out, grad_in]
                if update is not None:
                    updates.append(update)

            grad_x = grad_weight = grad_bias = None
            if need_x:
                update = updates[0] if len(updates) == 1 else torch.cat(updates)
                if noise is None:
                    grad_x = grad_y @ (weight + update).to(grad_y.dtype)
                else:
                    grad_x = grad_y @ weight.to(grad_y.dtype)
                    extra = _low_precision_linear(noisy_grad, update.T)
                    grad_x += extra if entries is None else extra * entries
                grad_x = grad_x.view(x.shape)
            if need_weight:
                grad_weight = (grad_y.T @ tall_x).to(weight.dtype)
            if need_bias:
                grad_bias = grad_y.sum(0)
        return grad_x, grad_weight, grad_bias, None, None, *grads


def _factor_gradients(
    rule: UpdateRule,
    out_factors: Tensor,
    in_factors: Tensor,
    tau: Tensor | None,
    grad: Tensor,
    need_update: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`UpdateRule.backward` in the kernel's precision, with the gradients in the factors' own type."""
    dtype = kernel_dtype(out_factors, in_factors)
    with full_precision(out_factors.device.type):
        grad_out, grad_in, update = rule.backward(
            out_factors.to(dtype), in_factors.to(dtype), tau, grad.to(dtype), need_update
        )
    return grad_out.to(out_factors.dtype), grad_in.to(in_factors.dtype), update


def _merged_is_exact(x: Tensor, weight: Tensor) -> bool:
    """Whether a product with `W + dW` keeps the update: only where products round no more than fp32 does."""
    if x.dtype == weight.dtype == torch.float64:
        return True
    return x.dtype == weight.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"


def _low_precision_linear(x: Tensor, update: Tensor) -> Tensor:
    """`x update^T` in the type of `x`. The update is scaled by a power of two where its entries would underflow."""
    if x.dtype != torch.float16:
        return F.linear(x, update.to(x.dtype))
    peak = update.abs().amax().clamp(min=torch.finfo(update.dtype).tiny)
    factor = torch.exp2(torch.floor(torch.log2(_FP16_UPDATE_PEAK / peak)))
    return F.linear(x, (update * factor).to(x.dtype)).to(update.dtype).div_(factor).to(x.dtype)
