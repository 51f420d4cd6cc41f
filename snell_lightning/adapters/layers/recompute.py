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

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from snell_lightning.adapters.errors import UserError

_log = logging.getLogger(__name__)

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
# Attributes of tensors: what one was made from, and its copy in another type.
_PRODUCED, _CAST = "_snell_produced", "_snell_cast"
# Attributes of other people's modules: whether one gives the same output again, in training and in evaluation, and a
# block's name.
_REPEATS, _NAME = "_snell_repeats", "_snell_name"
# Attributes whose value at forward holds in the run in backward too.
_SETTINGS = ("training", "_sparsity")


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


def recompute_blocks(model: nn.Module, names: Sequence[str]) -> None:
    """Run these blocks again in backward, all but the last."""
    if len(names) < 2:
        _log.warning(
            "recompute is 'blocks', but the adapted layers do not lie in several numbered modules, so that none is run "
            "again: it acts as 'inputs'"
        )
    for name in names[:-1]:
        block = model.get_submodule(name)
        if not isinstance(block, _Recomputed):
            block.__class__ = _recomputed(type(block))  # type: ignore[arg-type]
            setattr(block, _NAME, name)


def keep_everything(model: nn.Module) -> None:
    """Undo `rebuild_inputs` and `recompute_blocks`."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook is _tell_source:
                del module._forward_hooks[key]
        if isinstance(module, _Recomputed):
            module.__class__ = type(module).__mro__[2]
        for attribute in {_REPEATS, _NAME} & vars(module).keys():
            delattr(module, attribute)


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
        if source is not output and _repeats(module, source, output):
            setattr(output, _PRODUCED, _Produced(module, source.detach(), output._version))


def _repeats(module: nn.Module, source: Tensor, output: Tensor) -> bool:
    """Whether a module makes the same output again; tried the first time, in training and in evaluation."""
    known = vars(module).setdefault(_REPEATS, {})
    if module.training not in known:
        if not _have_values((source, output)):
            return True
        # With other random numbers than before, as in backward.
        with torch.no_grad(), _Randomness([source]).apart():
            known[module.training] = torch.equal(module.forward(source.detach().clone()), output)
    return known[module.training]


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
        if torch.compiler.is_compiling():
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        assert isinstance(self, nn.Module)
        leaves, structure = tree_flatten((args, kwargs))
        call = _Call(self, forward, (args, kwargs), structure)
        known = vars(self).setdefault(_REPEATS, {})
        if self.training in known or not _have_values(leaves):
            return checkpoint(call, *leaves, use_reentrant=False)
        randomness = _Randomness(leaves)
        output = checkpoint(call, *leaves, use_reentrant=False)
        # In hooks of its own: what is kept here is no part of an outer block's forward.
        with randomness.again(), saved_tensors_hooks(_same, _same):
            difference = _difference(output, call(*leaves))
        if difference:
            raise UserError(
                f"recompute is 'blocks', and {vars(self)[_NAME]} ({type(self).__mro__[2].__name__}) cannot be run "
                f"again: the second run {difference}; it keeps a state or changes its input. Use recompute 'inputs'"
            )
        known[self.training] = True
        return output

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle names what it is made of.
        return _empty_recomputed, (type(self).__mro__[2],), self.__dict__


@cache
def _recomputed(cls: type) -> type[nn.Module]:
    return type(f"Recomputed{cls.__name__}", (_Recomputed, cls), {})


def _empty_recomputed(cls: type) -> Any:
    return object.__new__(_recomputed(cls))


class _Call:
    """A block's forward, to be run now and again in backward under the settings of now.

    The first run gets the very arguments of the caller, who sees what the block puts into a list or a dictionary; a
    later one gets them as they were before.
    """

    def __init__(
        self, block: nn.Module, forward: Callable[..., Any], arguments: tuple[Any, Any], structure: TreeSpec
    ) -> None:
        self.block, self.forward, self.structure = block, forward, structure
        self.arguments: tuple[Any, Any] | None = arguments
        self.settings = [
            (vars(module), {name: vars(module)[name] for name in _SETTINGS if name in vars(module)})
            for module in block.modules()
        ]
        self.versions = self._versions()

    def __call__(self, *leaves: Any) -> Any:
        if self.arguments is not None:
            (args, kwargs), self.arguments = self.arguments, None
            return self.forward(*args, **kwargs)
        if self._versions() != self.versions:
            raise UserError(
                f"a trained tensor of {vars(self.block)[_NAME]} was changed between forward and backward; "
                "step the optimizer after backward"
            )
        args, kwargs = tree_unflatten(leaves, self.structure)
        with self._settings_of_then():
            return self.forward(*args, **kwargs)

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self.block.parameters() if parameter.requires_grad]

    @contextmanager
    def _settings_of_then(self) -> Iterator[None]:
        now = [(attributes, {name: attributes[name] for name in then}) for attributes, then in self.settings]
        try:
            for attributes, then in self.settings:
                attributes.update(then)
            yield
        finally:
            for attributes, before in now:
                attributes.update(before)


class _Randomness:
    """The state of the generators, as `checkpoint` keeps it: on the CPU and on the device of the first tensor."""

    def __init__(self, leaves: Iterable[Any]) -> None:
        self.state = torch.get_rng_state()
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type != "cpu"]
        self.device = tensors[0].device if tensors else None
        if self.device is not None:
            self.device_state = torch.get_device_module(self.device).get_rng_state(self.device)

    def apart(self) -> AbstractContextManager[None]:
        """Within, what is drawn changes nothing for those outside."""
        devices, kind = ([], "cuda") if self.device is None else ([self.device], self.device.type)
        return torch.random.fork_rng(devices, device_type=kind)

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same, and the numbers drawn are those that were drawn after the state was taken."""
        with self.apart():
            torch.set_rng_state(self.state)
            if self.device is not None:
                torch.get_device_module(self.device).set_rng_state(self.device_state, self.device)
            yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _have_values(values: Iterable[Any]) -> bool:
    """Whether the tensors among these hold numbers that can be compared."""
    return not any(
        isinstance(value, Tensor) and (isinstance(value, FakeTensor) or value.device.type == "meta") for value in values
    )


def _difference(first: Any, second: Any) -> str | None:
    """How two outputs differ; None if they do not. On the CPU to the bit, elsewhere by no more than rounding."""
    one, one_structure = tree_flatten(first)
    other, other_structure = tree_flatten(second)
    if one_structure != other_structure:
        return "has an output of another structure"
    for a, b in zip(one, other, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"gives {tuple(b.shape)} {b.dtype} in place of {tuple(a.shape)} {a.dtype}"
        a, b = a.detach(), b.detach()
        if torch.equal(a, b):
            continue
        if not a.is_floating_point():
            return "gives other values"
        peak = a.nan_to_num(0.0, 0.0, 0.0).abs().amax().item()
        tolerance = 0.0 if a.device.type == "cpu" else torch.finfo(a.dtype).eps ** 0.5 * peak
        if not torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True):
            gap = (a - b).nan_to_num(0.0, 0.0, 0.0).abs().amax().item()
            return f"differs by {gap:.2g} where the first has values up to {peak:.2g}"
    return None
