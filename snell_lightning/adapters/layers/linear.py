"""A frozen linear layer, or 1x1 convolution, with trainable sparse updates.

The layer's `weight` and `bias` stay under their own names, so a backbone's state-dict keys do not change; the updates
are added as `deltas.0`, `deltas.1`, ... A fused `qkv` layer of 192 inputs and 576 outputs has three updates of
`(192, 192)`: the entries of q, k and v compete each among themselves.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_lightning.adapters.config import SnellConfig
from snell_lightning.adapters.errors import UserError
from snell_lightning.adapters.finding import why_not_adaptable
from snell_lightning.adapters.guards import MergeFirstError, refuse_dropped_gradients, refuse_export
from snell_lightning.adapters.layers.product import make_matrix, one_product_is_exact, tuned_linear, two_products
from snell_lightning.adapters.layers.recompute import Recipe, layer_input
from snell_lightning.adapters.layers.traced import traced_linear
from snell_lightning.adapters.update.delta import SnellDelta
from snell_lightning.adapters.update.kernels import full_precision
from snell_lightning.adapters.update.noise import Noise, draw_seed
from snell_lightning.adapters.update.shared import SharedThresholds, know

# What a module keeps its users' hooks in.
_HOOKS = frozenset(
    name for name in vars(nn.Module()) if name.endswith(("_hook", "_hooks", "_hooks_with_kwargs", "_always_called"))
)


class SnellLinear(nn.Module):
    """A linear layer whose weight is frozen and updated by one or more `SnellDelta`.

    Runs in the autocast type where autocast is on, in the input's type otherwise; kernel and competition run in fp32
    in either case.

    Args:
        linear: An `nn.Linear`, or an `nn.Conv2d` with a 1x1 kernel, no padding and one group. Its parameters are taken
            over, not copied, and frozen.
        config: Settings of the updates.
        slices: The projections that the layer holds, each with an update of its own: their number, if they are equal
            row blocks, such as 3 for a fused qkv, the top block first; or the rows of each, in the updates' order.
        layers: Number of layers that are adapted with this one, for the automatic scale.
        of_values: Places of those projections that attention averages, for the automatic scale.

    Raises:
        UserError: The layer is of another kind, or its outputs cannot be divided so.
    """

    def __init__(
        self,
        linear: nn.Module,
        config: SnellConfig,
        slices: int | Sequence[Sequence[int]] = 1,
        layers: int = 1,
        of_values: Collection[int] = (),
    ) -> None:
        super().__init__()
        reason = why_not_adaptable(linear)
        if reason:
            raise UserError(f"cannot adapt {linear}: {reason}")
        assert isinstance(linear, (nn.Linear, nn.Conv2d))
        self.out_features, self.in_features = linear.weight.shape[:2]
        sizes, order = _divided(self.out_features, slices)
        self.config = config
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        device = linear.weight.device
        self.deltas = nn.ModuleList(
            SnellDelta(self.in_features, rows, config, device=device, layers=layers, of_values=place in of_values)
            for place, rows in enumerate(sizes)
        )
        # Where updates do not lie one below the other: the row of the weight that each row of theirs belongs to.
        self.register_buffer("_order", None if order is None else order.to(device), persistent=False)
        self._stride = (linear.stride[0], linear.stride[1]) if isinstance(linear, nn.Conv2d) else None
        # In a list, so that it is no submodule: what `merged` turns back into the plain layer.
        self._plain = [linear]
        # `inject` gives all layers of a model the same one.
        self.thresholds = SharedThresholds()
        know(self)
        # For `guard`: whether something has read the weight, and whether the layer was called.
        self.read = self.called = False
        # Hooks go on being called, and whoever has their handles can remove them.
        for name, hooks in vars(linear).items():
            if name in _HOOKS:
                setattr(self, name, hooks)
        # For `call_layers`: whether what holds the layer computes with its weight instead of calling it.
        self.uncalled = False
        # For `updates_made_once`: whether to keep what the product is taken with; that, and what it was made from.
        self._keeps_made = False
        self._made: tuple[Any, Tensor] | None = None
        # Attributes of the parent module that `inject` changed, with the values that `merge` gives back.
        self.restore_on_merge: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        know(self)

    def __getattr__(self, name: str) -> Any:
        """A parameter or submodule. Whether the weight was read is noted: who reads it may not call the layer."""
        if name == "weight":
            self.__dict__["read"] = True
        try:
            return super().__getattr__(name)
        except AttributeError:
            plain = self.__dict__.get("_plain")
            if plain and not name.startswith("_") and hasattr(plain[0], name):
                raise MergeFirstError(f"an adapted layer has no {name}; call merge(model) first") from None
            raise

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, ..., in)` to `(batch, ..., out)`; as a convolution `(batch, in, H, W)` to `(batch, out, H', W')`."""
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            if self.config.kernel == "mixture":
                # It has no engine of its own: the graph ends here and goes on behind it.
                return torch.compiler.disable(self._tuned)(x)
            return self._traced(x)
        refuse_export(x)
        return self._tuned(x)

    def _traced(self, x: Tensor) -> Tensor:
        """The tuned product in a graph that `torch.compile` traces."""
        if not x.is_floating_point():
            raise UserError(f"a tuned layer takes floating-point input, not {x.dtype}; convert the input first")
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        x = Recipe(x.dtype, self._stride).arrange(x)
        noise = (self.config.dropout, self.config.drop_path) if self.training else (0.0, 0.0)
        bias, order = self._parameters["bias"], self._buffers["_order"]
        at_random = self.training and self.config.rounding == "random"
        y = traced_linear(x, self._flat_weight, bias, self.updates, noise, order, at_random)
        return y if self._stride is None else y.permute(0, 3, 1, 2)

    def _tuned(self, x: Tensor) -> Tensor:
        if self.training and not torch.is_grad_enabled():
            refuse_dropped_gradients()
        self.called = True
        if not x.is_floating_point():
            raise UserError(f"a tuned layer takes floating-point input, not {x.dtype}; convert the input first")
        if x.is_nested:
            return self._nested(x)
        x, kept, recipe = layer_input(x, self._stride, rebuild=self.config.recompute != "none")
        if self.training or torch.is_grad_enabled():
            noise = Noise.draw(self.config.dropout, self.config.drop_path) if self.training else None
            order, taus = self._buffers["_order"], self.thresholds.of(self)
            seed = draw_seed() if self.training and self.config.rounding == "random" else None
            y = tuned_linear(x, self._flat_weight, self.bias, self.updates, noise, kept, recipe, order, taus, seed)
        else:
            y = self._evaluate(x)
        return y if self._stride is None else y.permute(0, 3, 1, 2)

    @property
    def _flat_weight(self) -> Tensor:
        """The frozen weight `(out, in)`, not noted as read."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight.flatten(1)

    def whole_update(self) -> Tensor:
        """The updates as one matrix `(out, in)`, as applied, in fp32; differentiable."""
        update = torch.cat([delta.weight() for delta in self.updates])
        order = self._buffers["_order"]
        return update if order is None else update[order.argsort()]

    @property
    def updates(self) -> list[SnellDelta]:
        """The updates, in the order of their rows."""
        return [delta for delta in self.deltas if isinstance(delta, SnellDelta)]

    def keep_made(self, keep: bool) -> None:
        """Keep what evaluation makes until a tensor that it depends on is changed, or make it for every batch."""
        self._keeps_made, self._made = keep, None

    def train(self, mode: bool = True) -> "SnellLinear":
        """Training mode; what evaluation has made is dropped, and after training it is made for every batch."""
        self.keep_made(self._keeps_made and not mode)
        self.thresholds.forget(self)
        return super().train(mode)

    def _nested(self, x: Tensor) -> Tensor:
        """The product with rows of many lengths, as `nn.TransformerEncoder` makes of padded ones: one, with W + dW."""
        weight = self._flat_weight
        noisy = self.training and (self.config.dropout or self.config.drop_path)
        if noisy or not one_product_is_exact(x, weight):
            raise UserError(
                "a tuned layer takes a nested tensor in fp32 and without noise only; make the encoder with "
                "enable_nested_tensor=False"
            )
        return F.linear(x, weight + self.whole_update(), self.bias)

    def _evaluate(self, x: Tensor) -> Tensor:
        """The tuned product without gradients."""
        weight = self._flat_weight
        if one_product_is_exact(x, weight):
            return F.linear(x, self._product(x.dtype, weight), None if self.bias is None else self.bias.to(x.dtype))
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            y = two_products(x.reshape(-1, x.shape[-1]), self._product(dtype, None), weight, self.bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _product(self, dtype: torch.dtype, base: Tensor | None) -> Tensor:
        """`base + dW`: made now, or kept within `updates_made_once` and still right."""
        sources = [self._flat_weight, *self.deltas.parameters()]
        sparsities = tuple(delta.sparsity for delta in self.updates)
        key = (dtype, base is None, sparsities, tuple((t.data_ptr(), t._version) for t in sources))
        if self._made is not None and self._made[0] == key:
            return self._made[1]
        self._made = None
        weight = self._flat_weight
        with full_precision(weight.device.type):
            made = make_matrix(
                self.updates, weight.shape, dtype, base, self._buffers["_order"], self.thresholds.of(self)
            )
        if self._keeps_made:
            self._made = key, made
        return made

    def plain(self) -> nn.Module:
        """The plain layer again, of its original class, without the updates; it shares its weight with this one."""
        plain = self._plain[0]
        plain.weight, plain.bias = self.weight, self.bias
        plain._is_full_backward_hook = self._is_full_backward_hook
        plain.train(self.training)
        return plain

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The plain layer again, with the updates added to its weight in fp32 or better."""
        merged = self.weight + self.whole_update().view_as(self.weight)
        plain = self.plain()
        plain.weight = nn.Parameter(merged, requires_grad=False)
        return plain

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        kind = "" if self._stride is None else f", 1x1 convolution, stride={self._stride}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}{kind}"


def _divided(rows: int, slices: int | Sequence[Sequence[int]]) -> tuple[list[int], Tensor | None]:
    """The sizes of the parts, and their rows in turn; None for the latter if the parts lie one below the other."""
    if isinstance(slices, int):
        if slices < 1 or rows % slices:
            raise UserError(f"a layer of {rows} outputs cannot be divided into {slices} slices")
        return [rows // slices] * slices, None
    order = [row for part in slices for row in part]
    if sorted(order) != list(range(rows)) or not all(slices):
        raise UserError(
            f"a layer of {rows} outputs cannot be divided so: each row must be in one slice, and no slice empty"
        )
    return [len(part) for part in slices], None if order == sorted(order) else torch.tensor(order)


@contextmanager
def updates_made_once(model: nn.Module) -> Iterator[None]:
    """Within, evaluation without gradients makes each update once and keeps it: a matrix of the weight's size a layer.

    Otherwise every batch makes it anew. What changes a factor in the usual ways is noticed all the same; what does so
    behind autograd's back, through `.data`, is not.
    """
    layers = [module for module in model.modules() if isinstance(module, SnellLinear)]
    for layer in layers:
        layer.keep_made(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.keep_made(False)
