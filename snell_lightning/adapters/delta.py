"""The update of one weight matrix, and the product with it that keeps nothing of the matrix's size.

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

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from snell_lightning.adapters import compiled
from snell_lightning.adapters.competition import shrink_, survivor_slopes, survivor_values_, threshold, tiles
from snell_lightning.adapters.config import SnellConfig, check_fraction
from snell_lightning.adapters.kernels import evaluate, full_precision, kernel_dtype
from snell_lightning.adapters.recompute import Recipe

# A low-precision copy of dW is brought to this size first where the type's range is short (fp16).
_FP16_UPDATE_PEAK = 2.0**-4


# The rows of a weight that an update belongs to: where they do not lie together, their numbers.
Rows = slice | Tensor


@dataclass(frozen=True)
class UpdateRule:
    """How factors become an update: the kernel, the sparsifier and the sparsity in force."""

    kernel: str
    scale: float
    sparsifier: str
    sparsity: float

    @property
    def dense(self) -> bool:
        """Whether every entry takes part: no sparsifier, or nothing to drop."""
        return self.sparsifier == "none" or self.sparsity == 0

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
        if compiled.applies(self.kernel, out_factors, in_factors, base):
            kind, sparsity = ("none", None) if self.dense else (self.sparsifier, self.sparsity)
            return compiled.write(out_factors, in_factors, self.scale, kind, sparsity, buffer, base, factor)
        evaluation = evaluate(self.kernel, out_factors, in_factors, self.scale)
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
    ) -> tuple[Tensor, Tensor]:
        """Gradients of both factors from the gradient of what `write` wrote; that is put in the gradient's place.

        Args:
            out_factors: P.
            in_factors: Q.
            tau: The threshold.
            grad: `(out, in)` in the products' type; overwritten with `base + factor * update` if `rewrite` is true.
            base: As in `write`.
            factor: As in `write`.
            rewrite: Whether the update is wanted.
        """
        if compiled.applies(self.kernel, out_factors, in_factors, base, grad):
            kind = "none" if tau is None else self.sparsifier
            return compiled.backward(out_factors, in_factors, self.scale, kind, tau, grad, base, factor, rewrite)
        evaluation = evaluate(self.kernel, out_factors, in_factors, self.scale)
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
        of_p, of_q = evaluation.gradients()
        return of_p.mul_(factor), of_q.mul_(factor)

    def samples(self, out_factors: Tensor, in_factors: Tensor, tau: Tensor | None, *others: Tensor) -> bool:
        """Whether `sampled_backward` can be had, and is cheaper than a product and `backward`.

        Args:
            out_factors: P.
            in_factors: Q.
            tau: The threshold.
            others: The matrices that are read along the way.
        """
        if tau is None or self.sparsity < compiled.SPARSE:
            return False
        return compiled.applies(self.kernel, out_factors, in_factors, *others) and not compiled.ties(tau)

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
        return compiled.sampled_backward(
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


class SnellDelta(nn.Module):
    """A trainable, sparse update of a weight matrix `(out_features, in_features)`.

    Both factors start Kaiming-uniform with a = sqrt(5) over the whole tensor, as in the released code: uniform within
    `1 / sqrt(features * rank / pieces)`. Where the settings start at zero, the update is then made so: of the distance
    kernel every second piece begins equal to the one before it, so that their distances cancel; of the linear one P
    begins at zero, as in LoRA.

    Args:
        in_features: Columns of the matrix.
        out_features: Rows of the matrix.
        config: Rank, sparsity, kernel, sparsifier, pieces and scale.
        device: Where the factors live.
        dtype: Type of the factors; fp32 unless there is a reason.
        layers: Number of layers that are adapted with this one, for the automatic scale.

    Attributes:
        in_factors: Parameter `(pieces, in_features, rank / pieces)`.
        out_factors: Parameter `(pieces, out_features, rank / pieces)`.
        scale: Size of the distance kernel's coefficients.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: SnellConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.config = config
        columns = config.rank // config.pieces
        self.in_factors = nn.Parameter(torch.empty(config.pieces, in_features, columns, device=device, dtype=dtype))
        self.out_factors = nn.Parameter(torch.empty(config.pieces, out_features, columns, device=device, dtype=dtype))
        self.sparsity = config.sparsity
        self.scale = config.layer_scale(in_features, layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both factors anew."""
        for factors in (self.in_factors, self.out_factors):
            nn.init.kaiming_uniform_(factors, a=math.sqrt(5))
            if self.config.starts_at_zero and self.config.kernel == "distance":
                with torch.no_grad():
                    factors[1::2] = factors[::2]
        if self.config.starts_at_zero and self.config.kernel == "linear":
            nn.init.zeros_(self.out_factors)

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
        return UpdateRule(self.config.kernel, self.scale, self.config.sparsifier, self._sparsity)

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
        dropout: Probability of dropping an entry of the update's input; kept to 1/65536.
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

    @property
    def _cut(self) -> int:
        """How many of the 65536 values of 16 random bits drop an entry."""
        return min(round(self.dropout * 2**16), 2**16 - 1)

    @property
    def scale(self) -> float:
        """What the update is multiplied with, so that its mean stays."""
        return 1 / ((1 - self._cut / 2**16) * (1 - self.drop_path))

    def dropped_entries(self, rows: int, columns: int, device: torch.device) -> Tensor | None:
        """A mask `(rows, columns)`, true where the update's input is dropped; None without dropout."""
        if not self._cut:
            return None
        generator = torch.Generator(device).manual_seed(self.seed)
        # One 64-bit draw makes four entries: drawing is what a mask costs.
        draws = torch.empty((rows * columns + 3) // 4, dtype=torch.int64, device=device)
        bits = draws.random_(-(2**63), 2**63 - 1, generator=generator).view(torch.int16)
        return (bits[: rows * columns] < self._cut - 2**15).view(rows, columns)

    def row_ranges(self, rows: int, samples: int) -> tuple[list[slice], list[slice]]:
        """Rows of kept samples and of dropped ones, of `rows` that belong to `samples` in turn; known to the host."""
        if not self.drop_path or not samples:
            return [slice(0, rows)], []
        generator = torch.Generator().manual_seed(self.seed)
        kept = (torch.rand(samples, generator=generator) >= self.drop_path).tolist()
        ranges: tuple[list[slice], list[slice]] = [], []
        each, start = rows // samples, 0
        for sample in range(1, samples + 1):
            if sample == samples or kept[sample] != kept[start]:
                ranges[0 if kept[start] else 1].append(slice(start * each, sample * each))
                start = sample
        return ranges


@dataclass(frozen=True)
class _Plan:
    """What the forward of a tuned layer decides and its backward follows; of tensors only the numbers of rows.

    Attributes:
        rules: How each update is made.
        noise: Dropout and drop path, or None.
        samples: Number of samples that the rows belong to.
        recipe: How x is made from what is kept of it.
        rows: Rows of the weight that each update belongs to; by default one below the other.
    """

    rules: list[UpdateRule]
    noise: Noise | None
    samples: int
    recipe: Recipe
    rows: Sequence[Rows] | None = None

    @property
    def scale(self) -> float:
        """What the updates are multiplied with."""
        return self.noise.scale if self.noise else 1.0

    def updates(
        self, factors: Sequence[Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[UpdateRule, Tensor, Tensor, Rows]]:
        """Each update's rule, P and Q in the kernel's precision, and its rows of the weight."""
        start = 0
        for at, (rule, out_factors, in_factors) in enumerate(zip(self.rules, factors[::2], factors[1::2], strict=True)):
            below = slice(start, start + out_factors.shape[1])
            start = below.stop
            rows = below if self.rows is None else self.rows[at]
            yield rule, out_factors.to(dtype), in_factors.to(dtype), rows

    def row_ranges(self, rows: int) -> tuple[list[slice], list[slice]]:
        """Rows of kept samples, and of dropped ones."""
        return self.noise.row_ranges(rows, self.samples) if self.noise else ([slice(0, rows)], [])

    def dropped_entries(self, x: Tensor) -> Tensor | None:
        """Where the updates' input `x (rows, in)` is dropped; None without dropout."""
        return self.noise.dropped_entries(len(x), x.shape[1], x.device) if self.noise else None


def tuned_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: Sequence[SnellDelta],
    noise: Noise | None = None,
    kept: Tensor | None = None,
    recipe: Recipe | None = None,
    rows: Sequence[Rows] | None = None,
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
        rows: Rows of the weight that each update belongs to; by default one below the other.

    Returns:
        `(batch, ..., out)` in the type of x.
    """
    factors = [factor for delta in deltas for factor in (delta.out_factors, delta.in_factors)]
    samples = len(x) if x.dim() > 1 else 1
    plan = _Plan([delta.rule for delta in deltas], noise, samples, recipe or Recipe(x.dtype), rows)
    y = _TunedLinear.apply(x, x.detach() if kept is None else kept, weight, bias, plan, *factors)
    return y.view(*x.shape[:-1], y.shape[-1])


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
        entries: Mask of the entries of x that the update does not see, or None.
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


class _Update(torch.autograd.Function):
    """Factors to update, with the closed-form gradient and nothing kept but factors and threshold."""

    @staticmethod
    def forward(ctx: Any, out_factors: Tensor, in_factors: Tensor, rule: UpdateRule) -> Tensor:
        dtype = kernel_dtype(out_factors, in_factors)
        with full_precision(out_factors.device.type):
            update = out_factors.new_empty(out_factors.shape[1], in_factors.shape[1], dtype=dtype)
            tau = rule.write(out_factors.to(dtype), in_factors.to(dtype), update)
        ctx.rule = rule
        ctx.save_for_backward(out_factors, in_factors, tau)
        return update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        out_factors, in_factors, tau = ctx.saved_tensors
        dtype = kernel_dtype(out_factors, in_factors)
        with full_precision(grad.device.type):
            grads = ctx.rule.backward(out_factors.to(dtype), in_factors.to(dtype), tau, grad, rewrite=False)
        return grads[0].to(out_factors.dtype), grads[1].to(in_factors.dtype), None


class _TunedLinear(torch.autograd.Function):
    """The tuned product. Inputs: x, what is kept of it, weight, bias, plan, then P and Q of each update in turn.

    The output is `(rows, out)` whatever the leading dimensions of x are: a view made in here could not be modified in
    place by what follows, as activation functions do.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan, *factors: Tensor
    ) -> Tensor:
        tall_x = x.reshape(-1, x.shape[-1])
        kept_rows, dropped_rows = plan.row_ranges(len(tall_x))
        entries = plan.dropped_entries(tall_x)
        one_product = entries is None and one_product_is_exact(x, weight)

        taus = []
        dtype = kernel_dtype(*factors, x)
        buffer = x.new_empty(weight.shape, dtype=dtype)
        with full_precision(x.device.type):
            for rule, p, q, rows in plan.updates(factors, dtype):
                base = weight[rows] if one_product else None
                part = buffer[rows]
                taus.append(rule.write(p, q, part, base, plan.scale))
                _put_back(buffer, rows, part)
        with torch.autocast(x.device.type, enabled=False):
            if one_product:
                bias = None if bias is None else bias.to(x.dtype)
                y = F.linear(tall_x, buffer, bias)
                for rows in dropped_rows:
                    y[rows] = F.linear(tall_x[rows], weight.to(x.dtype), bias)
            else:
                y = two_products(tall_x, buffer, weight, bias, entries, kept_rows, dropped_rows)
        ctx.plan = plan
        ctx.save_for_backward(kept, weight, *factors, *taus)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        count = len(plan.rules)
        kept, weight, *rest = ctx.saved_tensors
        factors, taus = rest[: 2 * count], rest[2 * count :]
        need_x, _, need_weight, need_bias = ctx.needs_input_grad[:4]

        x = plan.recipe.rebuild(kept)
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        kept_rows, dropped_rows = plan.row_ranges(len(x))
        grad_weight = grad_bias = None
        with torch.autocast(x.device.type, enabled=False):
            if need_weight:
                grad_weight = (grad_y.T @ x).to(weight.dtype)
            if need_bias:
                grad_bias = grad_y.sum(0)
            entries = plan.dropped_entries(x)
            x = x if entries is None else x.masked_fill(entries, 0.0)
        # What grad_y is multiplied with, W + dW, comes into the place of the update's gradient.
        dtype = kernel_dtype(*factors, x)
        updates = list(zip(plan.updates(factors, dtype), taus, strict=True))
        bases = [weight[rows] if entries is None else None for (*_, rows), _ in updates]
        grads: list[Tensor | None] = []
        if all(rule.samples(p, q, tau, grad_y, x, weight) for (rule, p, q, _), tau in updates):
            buffer = grad_y.new_empty(weight.shape if need_x else 0)
            for ((rule, p, q, rows), tau), base in zip(updates, bases, strict=True):
                out = buffer[rows] if need_x else None
                grads += rule.sampled_backward(p, q, tau, grad_y[:, rows], x, kept_rows, out, base, plan.scale)
                if out is not None:
                    _put_back(buffer, rows, out)
        else:
            with torch.autocast(x.device.type, enabled=False):
                buffer = _product_over(kept_rows, grad_y, x)
            if buffer.dtype == torch.float16:
                # An update may be too small for this type; what is written over the gradient is.
                buffer = buffer.to(dtype)
            del x
            with full_precision(grad_y.device.type):
                for ((rule, p, q, rows), tau), base in zip(updates, bases, strict=True):
                    part = buffer[rows]
                    grads += rule.backward(p, q, tau, part, base, plan.scale, rewrite=need_x)
                    if need_x:
                        _put_back(buffer, rows, part)
        grads = [None if grad is None else grad.to(factors[0].dtype) for grad in grads]

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
        return grad_x, None, grad_weight, grad_bias, None, *grads


def _put_back(matrix: Tensor, rows: Rows, part: Tensor) -> None:
    """Write rows that were taken out of a matrix; those that lie together are a view of it."""
    if not isinstance(rows, slice):
        matrix[rows] = part


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
