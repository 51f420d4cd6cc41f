"""Layers that a module computes with, without calling them: within it, they are called all the same.

    F.linear(x, self.qkv.weight, self.qkv.bias)   is   self.qkv(x)

torchvision's Swin computes so, for one.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class CalledInstead(TorchFunctionMode):
    """Within, a product with the weight of one of these layers is a call of that layer.

    Args:
        layers: By name.

    Attributes:
        met: Names of those that were called in this way.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._named = {id(layer._parameters["weight"]): (name, layer) for name, layer in layers.items()}
        self._inside: set[int] = set()
        self.met: set[str] = set()

    def watch(self) -> None:
        """Leave out products in a layer's own forward, which it is called for already."""
        for _, layer in self._named.values():
            layer.register_forward_pre_hook(lambda module, _: self._inside.add(id(module)))
            layer.register_forward_hook(lambda module, *_: self._inside.discard(id(module)))

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call the layer, or the function as it is. What is called within is not looked at."""
        kwargs = kwargs or {}
        if func is F.linear:
            rest = ("input", "weight", "bias")[len(args) :]
            x, weight, bias = (*args, *(kwargs.get(name) for name in rest))
            name, layer = self._named.get(id(weight), ("", None))
            if layer is not None and id(layer) not in self._inside:
                self.met.add(name)
                return _with_bias(layer, x, bias)
        return func(*args, **kwargs)


class _Within:
    """Hooks around the forward of a module that computes with these layers' weights."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self.modes: list[CalledInstead] = []

    def before(self, module: nn.Module, arguments: Any) -> None:
        self.modes.append(CalledInstead(self.layers))
        self.modes[-1].__enter__()

    def after(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self.modes.pop().__exit__(None, None, None)


def call_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """From here on those of these layers that are `uncalled` are called, where what holds them uses their weights."""
    holders: dict[str, dict[str, nn.Module]] = {}
    for name, layer in layers.items():
        if layer.uncalled:
            holders.setdefault(name.rpartition(".")[0], {})[name] = layer
    for name, held in holders.items():
        within, module = _Within(held), model.get_submodule(name)
        module.register_forward_pre_hook(within.before)
        # Also where the forward raises: the mode must not outlive it.
        module.register_forward_hook(within.after, always_call=True)


def call_no_layers(modules: Iterable[nn.Module]) -> None:
    """Undo `call_layers`."""
    for module in modules:
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), _Within):
                    del hooks[key]
                    module._forward_hooks_always_called.pop(key, None)


def _with_bias(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's output with this bias in the place of its own."""
    y, own = layer(x), layer._parameters["bias"]
    if bias is own:
        return y
    return y + ((0 if bias is None else bias) - (0 if own is None else own))
