"""The trainable update of one weight matrix: its factors, and the matrix that they make."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from snell_lightning.adapters.config import SnellConfig, check_fraction
from snell_lightning.adapters.update.kernels import full_precision, kernel_dtype
from snell_lightning.adapters.update.rule import UpdateRule
from snell_lightning.adapters.update.stack import Stack

# Of the mixture kernel, and where it starts.
_MIXING = {"alpha": 1.0, "gamma": 1.0, "beta": 0.0}


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
        of_values: Whether attention averages what the projection gives, for the automatic scale.

    Attributes:
        in_factors: Parameter `(pieces, in_features, rank / pieces)`.
        out_factors: Parameter `(pieces, out_features, rank / pieces)`.
        alpha: Parameter `(1,)` of the mixture kernel alone, as are `gamma` and `beta`.
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
        of_values: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.config = config
        columns = config.rank // config.pieces
        self.in_factors = nn.Parameter(torch.empty(config.pieces, in_features, columns, device=device, dtype=dtype))
        self.out_factors = nn.Parameter(torch.empty(config.pieces, out_features, columns, device=device, dtype=dtype))
        if config.kernel == "mixture":
            self.alpha, self.gamma, self.beta = (
                nn.Parameter(torch.empty(1, device=device, dtype=dtype)) for _ in _MIXING
            )
        self.sparsity = config.sparsity
        self._layers = layers
        self.of_values = of_values
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both factors anew."""
        if self.config.kernel == "mixture":
            for name, value in _MIXING.items():
                nn.init.constant_(getattr(self, name), value)
        for factors in (self.in_factors, self.out_factors):
            nn.init.kaiming_uniform_(factors, a=math.sqrt(5))
            if self.config.starts_at_zero and self.config.kernel == "distance":
                with torch.no_grad():
                    factors[1::2] = factors[::2]
        if self.config.starts_at_zero and self.config.kernel == "linear":
            nn.init.zeros_(self.out_factors)

    @property
    def of_values(self) -> bool:
        """Whether attention averages what the projection gives; setting it sets the scale."""
        return self._of_values

    @of_values.setter
    def of_values(self, value: bool) -> None:
        self._of_values = value
        self.scale = self.config.layer_scale(self.in_features, self._layers, value)

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
        return _Update.apply(self.rule, *operands([self]))

    def adapter_params(self) -> list[str]:
        """Names of this module's own parameters that belong to the adapter."""
        return ["in_factors", "out_factors", *(_MIXING if self.config.kernel == "mixture" else ())]

    def extra_repr(self) -> str:
        """Sizes and settings, for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.config.rank}, "
            f"sparsity={self.sparsity:g}, kernel={self.config.kernel}, sparsifier={self.config.sparsifier}"
        )


def operands(deltas: Sequence[SnellDelta]) -> list[Tensor]:
    """What updates are made from, as `Stack` takes it: P and Q of each, and behind them what mixes."""
    factors = [factor for delta in deltas for factor in (delta.out_factors, delta.in_factors)]
    mixed = [delta for delta in deltas if delta.config.kernel == "mixture"]
    return factors + [torch.cat([delta.alpha, delta.gamma, delta.beta]) for delta in mixed]


class _Update(torch.autograd.Function):
    """Factors to update, with the closed-form gradient and nothing kept but factors and threshold."""

    @staticmethod
    def forward(ctx: Any, rule: UpdateRule, *factors: Tensor) -> Tensor:
        out_factors, in_factors = factors[:2]
        dtype = kernel_dtype(*factors)
        with full_precision(out_factors.device.type):
            update = out_factors.new_empty(out_factors.shape[1], in_factors.shape[1], dtype=dtype)
            taus = Stack([rule], factors).write(update, None, 1.0, None)
        ctx.rule, ctx.count = rule, len(factors)
        ctx.save_for_backward(*factors, *taus)
        return update

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factors, taus = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        with full_precision(grad.device.type):
            grads = Stack([ctx.rule], factors).backward(taus, grad.contiguous(), None, 1.0, rewrite=False)
        return None, *(each.to(factor.dtype) for each, factor in zip(grads, factors, strict=True))
