"""A frozen linear layer, or 1x1 convolution, with trainable sparse updates.

The layer's `weight` and `bias` stay under their own names, so a backbone's state-dict keys do not change; the updates
are added as `deltas.0`, `deltas.1`, ... A fused `qkv` layer of 192 inputs and 576 outputs has three updates of
`(192, 192)`: the entries of q, k and v compete each among themselves.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from snell_lightning.adapters.config import SnellConfig
from snell_lightning.adapters.delta import Noise, SnellDelta, tuned_linear
from snell_lightning.adapters.errors import UserError


class SnellLinear(nn.Module):
    """A linear layer whose weight is frozen and updated by one or more `SnellDelta`.

    Runs in the autocast type where autocast is on, in the input's type otherwise; kernel and competition run in fp32
    in either case.

    Args:
        linear: An `nn.Linear`, or an `nn.Conv2d` with a 1x1 kernel, no padding and one group. Its parameters are taken
            over, not copied, and frozen.
        config: Settings of the updates.
        slices: Number of equal row blocks with an update of their own: 3 for a fused qkv. The top block comes first.

    Raises:
        UserError: The layer is of another kind, or its outputs cannot be divided into `slices`.
    """

    def __init__(self, linear: nn.Module, config: SnellConfig, slices: int = 1) -> None:
        super().__init__()
        reason = why_not_adaptable(linear)
        if reason:
            raise UserError(f"cannot adapt {linear}: {reason}")
        assert isinstance(linear, (nn.Linear, nn.Conv2d))
        self.out_features, self.in_features = linear.weight.shape[:2]
        if slices < 1 or self.out_features % slices:
            raise UserError(f"a layer of {self.out_features} outputs cannot be divided into {slices} slices")
        self.config = config
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        rows = self.out_features // slices
        self.deltas = nn.ModuleList(
            SnellDelta(self.in_features, rows, config, device=linear.weight.device) for _ in range(slices)
        )
        self._stride = linear.stride if isinstance(linear, nn.Conv2d) else None
        # In a list, so that it is no submodule: what `merged` turns back into the plain layer.
        self._plain = [linear]
        # Attributes of the parent module that `inject` changed, with the values that `merge` gives back.
        self.restore_on_merge: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, ..., in)` to `(batch, ..., out)`; as a convolution `(batch, in, H, W)` to `(batch, out, H', W')`."""
        if self._stride is None:
            return self._tuned(x)
        rows, columns = self._stride
        x = x[:, :, ::rows, ::columns].permute(0, 2, 3, 1)
        return self._tuned(x).permute(0, 3, 1, 2)

    @property
    def updates(self) -> list[SnellDelta]:
        """The updates, top rows first."""
        return [delta for delta in self.deltas if isinstance(delta, SnellDelta)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _tuned(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        noise = Noise.draw(self.config.dropout, self.config.drop_path) if self.training else None
        weight = self.weight.flatten(1)
        return tuned_linear(x, weight, self.bias, self.updates, noise)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The plain layer again, of its original class, with the updates added to its weight in fp32 or better."""
        plain = self._plain[0]
        update = torch.cat([delta.weight() for delta in self.updates])
        merged = self.weight + update.view_as(self.weight)
        plain.weight = nn.Parameter(merged, requires_grad=False)
        plain.bias = self.bias
        plain.train(self.training)
        return plain

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        kind = "" if self._stride is None else f", 1x1 convolution, stride={self._stride}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{kind}"


def why_not_adaptable(module: Any) -> str | None:
    """Why a module cannot become a `SnellLinear`; `None` if it can."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weight without calling it"
    if isinstance(module, nn.Linear):
        return None
    if not isinstance(module, nn.Conv2d):
        return "only linear layers and 1x1 convolutions can be adapted"
    if module.groups != 1:
        return f"it is a grouped convolution ({module.groups} groups); only ungrouped 1x1 convolutions can be adapted"
    if tuple(module.kernel_size) != (1, 1):
        size = "x".join(map(str, module.kernel_size))
        return f"it is a {size} convolution; only 1x1 convolutions can be adapted"
    if module.padding not in (0, (0, 0), "valid", "same"):
        return f"it is a 1x1 convolution with padding {module.padding}; only those without padding can be adapted"
    return None
