"""Several adapters for one backbone: put on and taken off in milliseconds, with the frozen weights in memory once.

What an adapter brings is small: its factors, a head, and perhaps a class token. Each adapter's layers refer to the
backbone's own weights, so that taking one off and putting another on moves references alone. The tensors of the
backbone that an adapter replaces are put back when it is taken off.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snell_lightning.adapters.config import SnellConfig
from snell_lightning.adapters.errors import UserError
from snell_lightning.adapters.files import load_adapter, read_adapter
from snell_lightning.adapters.finding import heads
from snell_lightning.adapters.guards import guard
from snell_lightning.adapters.injection import inject, take_off
from snell_lightning.adapters.layers.attention import close_attention, open_attention
from snell_lightning.adapters.layers.calls import call_layers
from snell_lightning.adapters.layers.linear import SnellLinear
from snell_lightning.adapters.names import plain_name


@dataclass(frozen=True)
class _Adapter:
    """What one adapter brings, by name in the model; none of it is part of the model while another one is on."""

    layers: dict[str, SnellLinear]
    heads: dict[str, nn.Module]
    replaced: dict[str, Tensor]
    metadata: dict[str, Any]


class AdapterSet:
    """A backbone with several adapters, of which one is on. For evaluation: nothing of it is trained.

    Args:
        model: A plain backbone, in any state of its head; it is changed in place, and put into evaluation mode.
        backbone: The name it was created by, which every adapter file must name; None checks none.

    Attributes:
        model: The backbone with the adapter that is on.
        active: That adapter's name; None where none is on.
    """

    def __init__(self, model: nn.Module, backbone: str | None = None) -> None:
        self.model = model.eval()
        self.active: str | None = None
        self._backbone = backbone
        self._adapters: dict[str, _Adapter] = {}
        # Of the backbone's tensors that some adapter replaces, the values it came with.
        self._own: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they were loaded."""
        return tuple(self._adapters)

    def metadata(self, name: str) -> dict[str, Any]:
        """The metadata of an adapter's file.

        Raises:
            UserError: There is no adapter of that name.
        """
        return self._named(name).metadata

    def load(self, path: str | Path, name: str) -> None:
        """Load an adapter file, and put it on.

        Args:
            path: The file.
            name: To call it by.

        Raises:
            UserError: The name is taken, or the file does not belong to this backbone. What was on is on still.
        """
        if name in self._adapters:
            raise UserError(f"there is an adapter {name!r} already; give this one another name, or delete that one")
        tensors, metadata = read_adapter(path)
        before = self.active
        self.put_on(None)
        self._keep_own({plain_name(key) for key in tensors})
        try:
            self._make_heads(tensors)
            if metadata["config"] is not None:
                # Nothing is kept for backward here, so nothing needs to be made again.
                inject(self.model, replace(SnellConfig(**metadata["config"]), recompute="none"))
            load_adapter(path, self.model, self._backbone)
        except BaseException:
            self._take_off()
            self.put_on(before)
            raise
        self.model.requires_grad_(False).eval()
        own = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        layers = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, SnellLinear)}
        replaced = {key: own[key].detach().clone() for key in self._own if key in tensors}
        self._adapters[name] = _Adapter(layers, heads(self.model), replaced, metadata)
        self.active = name
        self._keep_made(True)

    def put_on(self, name: str | None) -> None:
        """Take off what is on, and put an adapter on; None leaves the plain backbone.

        Raises:
            UserError: There is no adapter of that name. What was on is on still.
        """
        wanted = None if name is None else self._named(name)
        if name == self.active:
            return
        self._take_off()
        if wanted is None:
            return
        for module_name, head in wanted.heads.items():
            self._put_head(module_name, head)
        open_attention(self.model)
        for module_name, layer in wanted.layers.items():
            place = self.model.get_submodule(module_name)
            assert isinstance(place.weight, Tensor)
            _put(self.model, module_name, layer.to(place.weight.device))
            for attribute in layer.restore_on_merge:
                setattr(self.model.get_submodule(module_name.rpartition(".")[0]), attribute, True)
        close_attention(self.model, wanted.layers.values())
        self._copy(wanted.replaced)
        call_layers(self.model, wanted.layers)
        guard(self.model, wanted.layers)
        self.model.eval()
        self.active = name
        self._keep_made(True)

    def delete(self, name: str) -> None:
        """Forget an adapter, and take it off if it is on.

        Raises:
            UserError: There is no adapter of that name.
        """
        self._named(name)
        if self.active == name:
            self.put_on(None)
        del self._adapters[name]

    def _named(self, name: str) -> _Adapter:
        if name not in self._adapters:
            raise UserError(f"there is no adapter {name!r}; loaded are {', '.join(self._adapters) or 'none'}")
        return self._adapters[name]

    def _take_off(self) -> None:
        """The plain backbone again; the head stays until another takes its place."""
        self._keep_made(False)
        take_off(self.model)
        self._copy(self._own)
        self.active = None

    def _keep_own(self, names: set[str]) -> None:
        """Keep the values of those of the backbone's tensors that an adapter is going to replace."""
        in_heads = tuple(f"{head}." for head in heads(self.model))
        for name, tensor in self.model.state_dict().items():
            if name in names and name not in self._own and not name.startswith(in_heads):
                self._own[name] = tensor.detach().clone()

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        tensors = self.model.state_dict()
        for name, value in values.items():
            tensors[name].copy_(value)

    def _keep_made(self, keep: bool) -> None:
        """Each update is made once, at the first batch, and dropped when the adapter is taken off."""
        if self.active is not None:
            for layer in self._adapters[self.active].layers.values():
                layer.keep_made(keep)

    def _make_heads(self, tensors: dict[str, Tensor]) -> None:
        """Heads of the adapter's own, of the number of classes that its file has."""
        for name, head in heads(self.model).items():
            weight = tensors.get(f"{name}.weight")
            if weight is None:
                raise UserError(f"the adapter has no tensor {name}.weight: it was made for another backbone")
            self._put_head(name, _resized(head, weight))

    def _put_head(self, name: str, head: nn.Module) -> None:
        _put(self.model, name, head)
        if hasattr(self.model, "num_classes"):
            vars(self.model)["num_classes"] = len(next(head.parameters()))


def _resized(head: nn.Module, weight: Tensor) -> nn.Module:
    """A new layer of a head's kind with as many outputs as `weight` has rows."""
    device = next(head.parameters()).device
    if isinstance(head, nn.Linear):
        return nn.Linear(weight.shape[1], len(weight), head.bias is not None, device=device)
    if isinstance(head, nn.Conv2d) and head.kernel_size == (1, 1):
        return nn.Conv2d(weight.shape[1], len(weight), 1, bias=head.bias is not None, device=device)
    raise UserError(f"a head of kind {type(head).__name__} cannot be made again; load one adapter at a time")


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
