"""Put adapters into a model, take them out again, and read or write what is trained.

`inject` replaces layers in place and freezes the rest; `merge` adds the updates to the weights and puts the plain
layers back. Which parameters are an adapter's is not guessed from their names: a module that has some says so
(`AdapterModule`).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from snell_lightning.adapters.config import SnellConfig
from snell_lightning.adapters.delta import SnellDelta
from snell_lightning.adapters.errors import UserError
from snell_lightning.adapters.linear import SnellLinear, why_not_adaptable
from snell_lightning.adapters.recompute import keep_everything, rebuild_inputs, recompute_blocks

# Parts of a backbone that hold linear layers or 1x1 convolutions and lie outside its blocks, and small networks inside
# a block that make a position bias rather than transform tokens.
_OUTSIDE_BLOCKS = frozenset(
    {
        "stem",
        "patch_embed",
        "pos_embed",
        "downsample",
        "downsamples",
        "head",
        "attn_pool",
        "rel_pos",
        "cpb_mlp",
        "meta_mlp",
    }
)
# Layers that hold several projections, and how many.
_FUSED = {"qkv": 3, "kv": 2}
# timm's attention with separate q and v biases reads `qkv.weight` and bypasses the layer, unless this attribute is set.
_CALLS_QKV = "qkv_bias_separate"


@runtime_checkable
class AdapterModule(Protocol):
    """A module that knows which of its own parameters are the adapter's."""

    def adapter_params(self) -> list[str]:
        """Names of parameters registered on this very module."""


def inject(model: nn.Module, config: SnellConfig) -> list[str]:
    """Adapt the layers of a model in place, and freeze everything else but the head and `train_also`.

    The head is what timm names as the model's classifier; it is never adapted and always trained. A model without such
    information has no head of its own kind: name its parameters in `train_also`.

    Args:
        model: A timm model, or any module whose layers `config.targets` names.
        config: Settings, and which layers.

    Returns:
        Names of the adapted layers, in the model's order.

    Raises:
        UserError: There is no layer to adapt, a named one cannot be adapted, a pattern matches nothing, or the model
            has adapters already.
    """
    if any(isinstance(module, SnellLinear) for module in model.modules()):
        raise UserError("the model has adapters already; call merge(model) before injecting others")
    targets = _find_targets(model, config)
    extra = _extra_parameters(model, config)

    head_parameters = {id(parameter) for head in heads(model).values() for parameter in head.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in head_parameters or name in extra)

    adapted = {
        id(layer): SnellLinear(layer, layer_config(name, config), _slices(name, layer))
        for name, layer in targets.items()
    }
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if id(child) in adapted:
                setattr(parent, child_name, adapted[id(child)])
                if child_name == "qkv" and getattr(parent, _CALLS_QKV, None) is False:
                    setattr(parent, _CALLS_QKV, True)
                    adapted[id(child)].restore_on_merge = {_CALLS_QKV: False}
    if config.recompute != "none":
        rebuild_inputs(model)
    if config.recompute == "blocks":
        recompute_blocks(model, targets)
    return list(targets)


def merge(model: nn.Module) -> nn.Module:
    """Add every update to its weight, in place, and put the plain layers back; a model without adapters stays as it is.

    The state dict then has the backbone's own keys. Weights come out in fp32 or better, since in a lower precision the
    update could be lost; a model of lower precision becomes fp32 as a whole, so that its layers still fit together.

    Returns:
        The model, for chaining. A `SnellLinear` given as the model itself is returned as a plain layer.
    """
    if isinstance(model, SnellLinear):
        return model.merged()
    keep_everything(model)
    plain = {id(module): module.merged() for module in model.modules() if isinstance(module, SnellLinear)}
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, SnellLinear):
                setattr(parent, child_name, plain[id(child)])
                for attribute, value in child.restore_on_merge.items():
                    setattr(parent, attribute, value)
    if plain and any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in model.parameters()):
        model.float()
    return model


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen weights of the adapted layers in another type, in place; what is trained stays in fp32.

    Frozen weights are rounded for good. Layers still compute in their input's type, or in autocast's.

    Args:
        model: A model that `inject` adapted.
        dtype: Such as `torch.bfloat16`, which halves the weights' memory.
    """
    for module in model.modules():
        if isinstance(module, SnellLinear):
            # The plain layer that the module keeps for merging has the same parameter.
            module.weight.data = module.weight.data.to(dtype)


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier layers that timm names for a model, by name; empty where there is no such information."""
    named = getattr(model, "pretrained_cfg", None) or {}
    names = named.get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    modules = dict(model.named_modules())
    found = {name: modules[name] for name in names if name in modules}
    if not found and hasattr(model, "get_classifier"):
        classifiers: Any = model.get_classifier()  # type: ignore[operator]
        classifiers = classifiers if isinstance(classifiers, (tuple, list)) else (classifiers,)
        found = {name: module for name, module in modules.items() if any(module is head for head in classifiers)}
    return found


def freeze_all_but_head(model: nn.Module) -> None:
    """Leave only the classifier trainable: a linear probe.

    Raises:
        UserError: The model does not say what its classifier is.
    """
    model.requires_grad_(False)
    found = heads(model)
    if not found:
        raise UserError("the backbone names no classifier, so without an adapter there is nothing to train")
    for head in found.values():
        head.requires_grad_(True)


def deltas(model: nn.Module) -> dict[str, SnellDelta]:
    """All updates of a model by name, in its order: `blocks.0.attn.qkv.deltas.0` updates the first block's q."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SnellDelta)}


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's own parameters, by their name in the model; the head is not among them."""
    for name, module in model.named_modules():
        if isinstance(module, AdapterModule):
            for local in module.adapter_params():
                yield (f"{name}.{local}" if name else local), getattr(module, local)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What tuning makes: the adapter's tensors and every other trainable one, such as the head, by their names.

    Returns:
        Detached tensors that share the parameters' memory.
    """
    wanted = {name for name, _ in adapter_parameters(model)}
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name in wanted
    }


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what `adapter_state_dict` gave into a model that was injected with the same settings.

    Raises:
        UserError: A tensor is missing, not expected, or of another shape. Nothing has been copied then.
    """
    check_adapter_state_dict(model, state)
    for name, tensor in adapter_state_dict(model).items():
        tensor.copy_(state[name])


def check_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], where: str = "the adapter") -> None:
    """Raise `UserError`, naming `where`, unless `state` has just the tensors that the model trains, in their shapes."""
    own = adapter_state_dict(model)
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    if missing:
        raise UserError(f"{where} lacks {_some(missing)}; was it made with other settings or another backbone?")
    if unexpected:
        raise UserError(
            f"the model has no place for {_some(unexpected)} of {where}; was it injected with the same settings?"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{name} is {tuple(state[name].shape)} in {where} and {tuple(tensor.shape)} in the model; "
                "give the model the settings and the number of classes that it was made with"
            )


def _find_targets(model: nn.Module, config: SnellConfig) -> dict[str, nn.Module]:
    """The layers to adapt, by name."""
    head_names = tuple(heads(model))
    layers: dict[str, nn.Module] = {}
    matched: set[str] = set()
    for name, module in model.named_modules():
        if not name or any(name == head or name.startswith(head + ".") for head in head_names):
            continue
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or _matching(config.exclude, name):
            continue
        if config.targets is None:
            if _inside_block(name) and why_not_adaptable(module) is None:
                layers[name] = module
            continue
        pattern = _matching(config.targets, name)
        if pattern is None:
            continue
        reason = why_not_adaptable(module)
        if reason:
            raise UserError(
                f"targets pattern {pattern!r} names {name}, which cannot be adapted: {reason}; "
                "narrow the pattern, or name the layer in exclude"
            )
        matched.update(other for other in config.targets if re.search(other, name))
        layers[name] = module
    _check_all_matched("targets", config.targets or (), matched, model)
    if not layers:
        raise UserError(
            "no layer to adapt was found: no linear layer or 1x1 convolution inside numbered blocks is left; "
            "name the layers in targets, as regular expressions over model.named_modules()"
        )
    for setting in ("rank_pattern", "sparsity_pattern", "dropout_pattern"):
        patterns = getattr(config, setting)
        used = {pattern for pattern in patterns if any(re.search(pattern, name) for name in layers)}
        _check_all_matched(setting, patterns, used, model, layers)
    return layers


def _extra_parameters(model: nn.Module, config: SnellConfig) -> set[str]:
    """Names of the backbone's parameters that are trained besides adapter and head."""
    names = [name for name, _ in model.named_parameters()]
    if config.train_also is None:
        return {name for name in names if name.rpartition(".")[2] == "cls_token"}
    used = {pattern for pattern in config.train_also if any(re.search(pattern, name) for name in names)}
    _check_all_matched("train_also", config.train_also, used, model, names)
    return {name for name in names if _matching(config.train_also, name)}


def _inside_block(name: str) -> bool:
    """Whether a layer lies below a numbered child, such as `blocks.3`, and in none of the parts outside blocks."""
    parents = name.split(".")[:-1]
    return any(part.isdigit() for part in parents) and _OUTSIDE_BLOCKS.isdisjoint(parents)


def layer_config(name: str, config: SnellConfig) -> SnellConfig:
    """The settings of one layer: those of the first matching pattern in place of the general ones."""
    changes: dict[str, Any] = {}
    for setting in ("rank", "sparsity", "dropout"):
        patterns = getattr(config, f"{setting}_pattern")
        pattern = _matching(patterns, name)
        if pattern is not None:
            changes[setting] = patterns[pattern]
    return replace(config, **changes)


def _slices(name: str, layer: nn.Module) -> int:
    slices = _FUSED.get(name.rpartition(".")[2], 1)
    rows: int = layer.weight.shape[0]  # type: ignore[index, assignment]
    return slices if rows % slices == 0 else 1


def _matching(patterns: Iterable[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if re.search(pattern, name)), None)


def _check_all_matched(
    setting: str,
    patterns: Iterable[str],
    matched: set[str],
    model: nn.Module,
    names: Iterable[str] | None = None,
) -> None:
    idle = [pattern for pattern in patterns if pattern not in matched]
    if idle:
        if names is None:
            names = [name for name, module in model.named_modules() if why_not_adaptable(module) is None]
        raise UserError(f"{setting} pattern {idle[0]!r} matches nothing; there is for example {_some(names)}")


def _some(names: Iterable[str], count: int = 3) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:count]) + (f" and {len(ordered) - count} more" if len(ordered) > count else "")
