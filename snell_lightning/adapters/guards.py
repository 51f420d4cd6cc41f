"""What would leave an adapter out without a word is found, and is an error.

A module may read an adapted layer's weight and compute with it itself: then the update does not count. Code that fuses
layers, exports a model or traces it does the same to all of them at once, and wants the plain model that `merge` gives.
"""

import sys
from collections.abc import Mapping
from functools import partial
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointFunction

from snell_lightning.adapters.errors import UserError, some
from snell_lightning.adapters.finding import ancestors

# What timm calls to fuse a module's layers for inference.
_FUSING = ("fuse", "reparameterize", "switch_to_deploy")


class MergeFirstError(UserError, AttributeError):
    """The plain model is needed; as an attribute error too, so that `hasattr` says no."""


class Watched(Protocol):
    """A layer that notes whether its weight was read, and whether it was called."""

    read: bool
    called: bool


def guard(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """See in every forward, of the model and of the modules that hold these layers, that none is bypassed."""
    within: dict[str, dict[str, Any]] = {"": dict(layers)}
    for name, layer in layers.items():
        within.setdefault(name.rpartition(".")[0], {})[name] = layer
    for name, watched in within.items():
        watch, module = _Watch(watched), model.get_submodule(name)
        module.register_forward_pre_hook(watch.before)
        module.register_forward_hook(watch.after)
    for name in {"", *(around for layer in layers for around in ancestors(layer))}:
        module = model.get_submodule(name)
        for method in _FUSING:
            if hasattr(module, method):
                vars(module).update({method: partial(_refuse, method)})


def unguard(model: nn.Module) -> None:
    """Undo `guard`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), _Watch):
                    del hooks[key]
        for method in _FUSING:
            if isinstance(own := vars(module).get(method), partial) and own.func is _refuse:
                delattr(module, method)


def refuse_export(x: object) -> None:
    """Raise where a layer is traced or exported: what came out would lack the update, or hold it as a constant."""
    if isinstance(x, fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting():
        _refuse("export")


def refuse_dropped_gradients() -> None:
    """Raise in a reentrant checkpoint whose inputs need no gradient: it would give none to the adapters inside it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            inputs = [value for value in frame.f_locals["args"] if isinstance(value, Tensor)]
            if not any(value.requires_grad for value in inputs):
                raise UserError(
                    "gradient checkpointing with use_reentrant=True drops the adapters' gradients, since nothing "
                    "before it needs one; pass use_reentrant=False, or use recompute 'blocks'"
                )
            return
        frame = frame.f_back


def _refuse(what: str, *args: Any, **kwargs: Any) -> None:
    raise MergeFirstError(f"{what} needs a plain model, and would leave the adapters out; call merge(model) first")


class _Watch:
    """Hooks around the forward of a module that holds adapted layers."""

    def __init__(self, layers: Mapping[str, Watched]) -> None:
        self.layers = layers

    def before(self, module: nn.Module, arguments: Any) -> None:
        """Forget what was read and called."""
        if not torch.compiler.is_compiling():
            for layer in self.layers.values():
                layer.read = layer.called = False

    def after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Raise if a layer was read that was not called."""
        if torch.compiler.is_compiling():
            return
        bypassed = [name for name, layer in self.layers.items() if layer.read and not layer.called]
        if bypassed:
            patterns = dict.fromkeys(r"\.".join(name.split(".")[-2:]) + "$" for name in bypassed)
            raise UserError(
                f"{type(module).__name__} computes with the weight of {some(bypassed)} without calling it, so that its "
                f"update would not count; leave it out with exclude {list(patterns)}"
            )
