"""Which layers of a model are adapted, how each is divided into projections, and why a layer cannot be taken."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from snell_lightning.adapters.config import SnellConfig
from snell_lightning.adapters.errors import UserError, some

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


def find_targets(model: nn.Module, config: SnellConfig) -> dict[str, nn.Module]:
    """The layers to adapt, by name."""
    head_names = tuple(heads(model))
    layers: dict[str, nn.Module] = {}
    matched: set[str] = set()
    for name, module in model.named_modules():
        if not name or any(name == head or name.startswith(head + ".") for head in head_names):
            continue
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or matching(config.exclude, name):
            continue
        if config.targets is None:
            if _inside_block(name) and why_not_adaptable(module) is None:
                layers[name] = module
            continue
        pattern = matching(config.targets, name)
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
    check_all_matched("targets", config.targets or (), matched, model)
    if not layers:
        raise UserError(
            "no layer to adapt was found: no linear layer or 1x1 convolution inside numbered blocks is left; "
            "name the layers in targets, as regular expressions over model.named_modules()"
        )
    for setting in ("rank_pattern", "sparsity_pattern", "dropout_pattern"):
        patterns = getattr(config, setting)
        used = {pattern for pattern in patterns if any(re.search(pattern, name) for name in layers)}
        check_all_matched(setting, patterns, used, model, layers)
    return layers


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


def _inside_block(name: str) -> bool:
    """Whether a layer lies below a numbered child, such as `blocks.3`, and in none of the parts outside blocks."""
    parents = name.split(".")[:-1]
    return any(part.isdigit() for part in parents) and _OUTSIDE_BLOCKS.isdisjoint(parents)


def layer_config(name: str, config: SnellConfig) -> SnellConfig:
    """The settings of one layer: those of the first matching pattern in place of the general ones."""
    changes: dict[str, Any] = {}
    for setting in ("rank", "sparsity", "dropout"):
        patterns = getattr(config, f"{setting}_pattern")
        pattern = matching(patterns, name)
        if pattern is not None:
            changes[setting] = patterns[pattern]
    return replace(config, **changes)


def slices_of(name: str, layer: nn.Module) -> int:
    slices = _FUSED.get(name.rpartition(".")[2], 1)
    rows: int = layer.weight.shape[0]  # type: ignore[index, assignment]
    return slices if rows % slices == 0 else 1


def matching(patterns: Iterable[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if re.search(pattern, name)), None)


def check_all_matched(
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
        raise UserError(f"{setting} pattern {idle[0]!r} matches nothing; there is for example {some(names)}")
