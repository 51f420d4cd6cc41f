"""Keep less for backward: make a tuned layer's input again, or a whole block's activations.

The gradient of an update needs the layer's input. In a transformer that is the output of a normalisation or of an
activation function, whose own backward keeps *its* input anyway:

    x ──> LayerNorm ──> n ──> fc1 ──> h ──> GELU ──> a ──> fc2
    kept for LayerNorm                kept for GELU
    (fc1 makes n from it)             (fc2 makes a from it)

So with `inputs` a tuned layer keeps a reference to that earlier tensor and applies the module again in backward:
elementwise work, the same kernels on the same numbers, so gradients are the same bit for bit. Of the 16 units (tokens x
width) that a ViT block keeps, 10 remain. Where the input comes from elsewhere, it is kept as it is.

With `blocks` only each block's input is kept besides, and the block runs once more in backward. The last block is left
as it is: its activations would be made again the moment they were dropped.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RECOMPUTE = ("none", "inputs", "blocks")

# Modules that are cheap and deterministic, and whose backward keeps their input and not their output (as ReLU's does).
# By the name of the class or of one that it derives from: torch's and timm's are alike in this.
_PRODUCERS = frozenset(
    {
        "LayerNorm",
        "LayerNorm2d",
        "GroupNorm",
        "GroupNorm1",
        "RMSNorm",
        "RmsNorm",
        "RmsNorm2d",
        "SimpleNorm",
        "SimpleNorm2d",
        "GELU",
        "GELUTanh",
        "QuickGELU",
        "SiLU",
        "Swish",
        "Mish",
        "Hardswish",
        "HardSwish",
    }
)
_PRODUCED, _CAST = "_snell_produced", "_snell_cast"


@dataclass(frozen=True)
class Recipe:
    """How a layer's input, `(batch, ..., in)`, is made from what is kept of it; without a tensor of its own.

    Attributes:
        dtype: Type of the input.
        stride: Of a 1x1 convolution, whose input is kept as `(batch, in, H, W)`; None of a linear layer.
        module: What is applied first, under `autocast`.
        autocast: Whether autocast was on, and its type.
    """

    dtype: torch.dtype
    stride: tuple[int, int] | None = None
    module: nn.Module | None = None
    autocast: tuple[bool, torch.dtype] = (False, torch.float32)

    def rebuild(self, kept: Tensor) -> Tensor:
        """The layer's input."""
        if self.module is not None:
            enabled, dtype = self.autocast
            with torch.no_grad(), torch.autocast(kept.device.type, dtype=dtype, enabled=enabled):
                kept = self.module.forward(kept)
        return self.arrange(kept.to(self.dtype))

    def arrange(self, x: Tensor) -> Tensor:
        """A convolution's input `(batch, in, H, W)` as a linear layer's, `(batch, H', W', in)`."""
        if self.stride is None:
            return x
        rows, columns = self.stride
        return x[:, :, ::rows, ::columns].permute(0, 2, 3, 1)


def layer_input(x: Tensor, stride: tuple[int, int] | None, rebuild: bool) -> tuple[Tensor, Tensor, Recipe]:
    """A layer's input in the type to compute in, what to keep of it, and how to get from the latter to the former.

    Args:
        x: What the layer was called with.
        stride: Of a 1x1 convolution, None of a linear layer.
        rebuild: Whether the input may be made from what the module before keeps.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    dtype = autocast[1] if autocast[0] and x.dtype != torch.float64 else x.dtype
    produced = getattr(x, _PRODUCED, None) if rebuild and torch.is_grad_enabled() else None
    if produced is not None and produced.version == x._version:
        recipe = Recipe(dtype, stride, produced.module, autocast)
        return recipe.arrange(x.to(dtype)), produced.source, recipe
    recipe = Recipe(dtype, stride)
    if x.dtype == dtype or not torch.is_grad_enabled():
        x = x.to(dtype)
        return recipe.arrange(x), x.detach(), recipe
    return recipe.arrange(x.to(dtype)), _shared_cast(x, dtype), recipe


def rebuild_inputs(model: nn.Module) -> None:
    """Let normalisations and activation functions say what their outputs were made from."""
    for module in model.modules():
        if any(cls.__name__ in _PRODUCERS for cls in type(module).__mro__) and not getattr(module, "inplace", False):
            module.register_forward_hook(_tell_source)


def recompute_blocks(model: nn.Module, layers: Iterable[str]) -> None:
    """Run the blocks that hold these layers again in backward, all but the last."""
    blocks = dict.fromkeys(_block_of(layers))
    for name in list(blocks)[:-1]:
        block = model.get_submodule(name)
        block.__class__ = _recomputed(type(block))  # type: ignore[arg-type]


def keep_everything(model: nn.Module) -> None:
    """Undo `rebuild_inputs` and `recompute_blocks`."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook is _tell_source:
                del module._forward_hooks[key]
        if isinstance(module, _Recomputed):
            module.__class__ = type(module).__mro__[2]


@dataclass(frozen=True)
class _Produced:
    """What a module's output was made from. `version` is the output's: it must not have been changed since."""

    module: nn.Module
    source: Tensor
    version: int


def _tell_source(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if len(arguments) == 1 and isinstance(arguments[0], Tensor) and isinstance(output, Tensor):
        source = arguments[0]
        if source is not output:
            setattr(output, _PRODUCED, _Produced(module, source.detach(), output._version))


def _shared_cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another type, to keep: layers called with the same tensor, as q, k and v may be, share one copy of it."""
    known = getattr(x, _CAST, None)
    if known is None or known[0].dtype != dtype or known[1] != x._version:
        known = x.detach().to(dtype), x._version
        setattr(x, _CAST, known)
    return known[0]


class _Recomputed:
    """Mixed into a block's class: in training the block keeps its inputs alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle names what it is made of.
        return _empty_recomputed, (type(self).__mro__[2],), self.__dict__


@cache
def _recomputed(cls: type) -> type[nn.Module]:
    return type(f"Recomputed{cls.__name__}", (_Recomputed, cls), {})


def _empty_recomputed(cls: type) -> Any:
    return object.__new__(_recomputed(cls))


def _block_of(layers: Iterable[str]) -> Iterable[str]:
    """For each layer the block it lies in: the innermost numbered module with two adapted layers or more.

    For example `layers.0.blocks.1` for `layers.0.blocks.1.mlp.fc1`.
    """
    ancestors = {}
    for layer in layers:
        parts = layer.split(".")
        numbered = [at for at, part in enumerate(parts[:-1], start=1) if part.isdigit()]
        ancestors[layer] = [".".join(parts[:at]) for at in numbered]
    counts = Counter(name for names in ancestors.values() for name in names)
    for names in ancestors.values():
        inner = [name for name in names if counts[name] > 1] or names
        if inner:
            yield inner[-1]
