"""Which layers of a model are adapted, why a layer cannot be taken, and which blocks layers lie in."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from snell_lightning.adapters.config import SnellConfig
from snell_lightning.adapters.errors import UserError, some
from snell_lightning.adapters.layers.attention import close_attention, open_attention, why_not_openable
from snell_lightning.adapters.names import plain_name

_log = logging.getLogger(__name__)

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
# Modules of other libraries than timm that are no blocks: they halve the resolution between two of them.
_NO_BLOCKS = frozenset({"PatchMerging", "PatchMergingV2"})
# Subclasses whose own forward is the plain product all the same.
_PLAIN_PRODUCTS = frozenset({"timm.layers.linear.Linear", "timm.layers.conv2d_same.Conv2dSame"})
# Of the backbone's weights; a default that reaches less of them is told.
_SMALL_SHARE = 0.1
_DIGITS = "0123456789"

Layer = nn.Linear | nn.Conv2d


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier layers that timm names for a model, by name; empty where there is no such information."""
    named = getattr(model, "pretrained_cfg", None) or {}
    names = named.get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    modules = dict(model.named_modules())
    found = {name: modules[name] for name in names if name in modules}
    get_classifier: Any = getattr(model, "get_classifier", None)
    if not found and get_classifier is not None:
        classifiers = get_classifier()
        classifiers = classifiers if isinstance(classifiers, (tuple, list)) else (classifiers,)
        found = {name: module for name, module in modules.items() if any(module is head for head in classifiers)}
    return found


@dataclass(frozen=True)
class Choice:
    """Whether a layer is adapted, and why.

    Attributes:
        name: Its name in the model; of torch's own attention, `in_proj` and `out_proj` are two layers.
        size: Inputs and outputs, such as `768 -> 3072`.
        adapted: Whether it is adapted.
        why: The reason, in words.
    """

    name: str
    size: str
    adapted: bool
    why: str

    def __str__(self) -> str:
        """One line."""
        return f"{'adapted' if self.adapted else 'left':8}{self.name} ({self.size}): {self.why}"


def explain(model: nn.Module, config: SnellConfig) -> list[Choice]:
    """What `inject` would do with each linear layer and convolution of a model, in its order, and why.

        print(*explain(model, SnellConfig()), sep="\\n")

    Args:
        model: A model without adapters; it is left as it is.
        config: The settings, of which `targets` and `exclude` matter.
    """
    open_attention(model)
    try:
        found = [
            Choice(plain_name(full), " -> ".join(map(str, reversed(module.weight.shape[:2]))), fits, why)
            for full, module, _, fits, why in _choices(model, config)
        ]
    finally:
        close_attention(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and (reason := why_not_openable(module)):
            found.append(Choice(f"{plain_name(name)}.in_proj", str(module.embed_dim), False, reason))
    return found


def find_targets(model: nn.Module, config: SnellConfig) -> dict[str, Layer]:
    """The layers to adapt, by name."""
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    matched: set[str] = set()
    for full, module, pattern, fits, why in _choices(model, config):
        name = plain_name(full)
        if pattern is None:
            continue
        if fits:
            layers[full] = module
            matched.update(other for other in config.targets or () if re.search(other, name))
        elif config.targets is not None:
            raise UserError(
                f"targets pattern {pattern!r} names {name}, which cannot be adapted: {why}; "
                "narrow the pattern, or name the layer in exclude"
            )
        elif isinstance(module, nn.Linear) or tuple(module.kernel_size) == (1, 1):
            left[name] = why
    check_all_matched("targets", config.targets or (), matched, model)
    if not layers:
        name, reason = next(iter(left.items()), ("", ""))
        raise UserError(
            "no layer to adapt was found: no linear layer or 1x1 convolution inside numbered blocks is left"
            + (f" ({name} cannot be adapted: {reason})" if name else "")
            + "; name the layers in targets, as regular expressions over model.named_modules()"
        )
    if config.targets is None:
        _tell_small_share(model, layers)
    for setting in ("rank_pattern", "sparsity_pattern", "dropout_pattern"):
        patterns = getattr(config, setting)
        used = {pattern for pattern in patterns if any(matching([pattern], name) for name in layers)}
        check_all_matched(setting, patterns, used, model, layers)
    return layers


def _choices(model: nn.Module, config: SnellConfig) -> Iterator[tuple[str, Layer, str | None, bool, str]]:
    """Each linear layer and convolution by name, what takes it (a pattern; `""` by default), if it fits, why."""
    head_names = tuple(heads(model))
    numbered = numbered_blocks(model)
    for full, module in model.named_modules():
        name = plain_name(full)
        if not name or not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        around = ancestors(full)
        within = type(model.get_submodule(around[-1])).__name__ if around else ""
        part = next((part for part in full.split(".")[:-1] if part in _OUTSIDE_BLOCKS), None)
        block = next((other for other in reversed(around) if other in numbered), None)
        excluded = matching(config.exclude, name)
        pattern = None if config.targets is None else matching(config.targets, name)
        if any(name == head or name.startswith(head + ".") for head in head_names):
            yield full, module, None, False, "it is the classifier, which is trained as a whole"
        elif excluded is not None:
            yield full, module, None, False, f"exclude {excluded!r} names it"
        elif config.targets is not None and pattern is None:
            yield full, module, None, False, "no pattern of targets names it"
        elif config.targets is None and block is None:
            yield full, module, None, False, "it is in no numbered block"
        elif config.targets is None and (part is not None or within in _NO_BLOCKS):
            yield full, module, None, False, f"it is in {part or within}, which is not taken for part of a block"
        elif reason := why_not_adaptable(module):
            yield full, module, pattern or "", False, reason
        else:
            why = f"it is in block {block}" if pattern is None else f"targets {pattern!r} names it"
            yield full, module, pattern or "", True, why


def _tell_small_share(model: nn.Module, layers: Mapping[str, Layer]) -> None:
    """Say so where what the default finds is little of the backbone."""
    in_heads = {id(parameter) for head in heads(model).values() for parameter in head.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in in_heads)
    share = sum(layer.weight.numel() for layer in layers.values()) / total
    if share < _SMALL_SHARE:
        _log.warning(
            f"the layers that are adapted by default ({len(layers)}) hold {share:.1%} of the backbone's weights; most "
            "of them are neither in linear layers nor in 1x1 convolutions of its blocks"
        )


def why_not_adaptable(module: Any) -> str | None:
    """Why a module cannot become a `SnellLinear`; `None` if it can."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weight without calling it"
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        return "only linear layers and 1x1 convolutions can be adapted"
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"it is a grouped convolution ({module.groups} groups); only ungrouped 1x1 ones can be adapted"
        if tuple(module.kernel_size) != (1, 1):
            size = "x".join(map(str, module.kernel_size))
            return f"it is a {size} convolution; only 1x1 convolutions can be adapted"
        if module.padding not in (0, (0, 0), "valid", "same"):
            return f"it is a 1x1 convolution with padding {module.padding}; only those without padding can be adapted"
    return _why_not_plain(module)


def adaptable_layers(model: nn.Module) -> dict[str, Layer]:
    """All layers that could become a `SnellLinear`, by name."""
    layers = {name: module for name, module in model.named_modules() if name and isinstance(module, Layer)}
    return {name: layer for name, layer in layers.items() if why_not_adaptable(layer) is None}


def _why_not_plain(layer: nn.Module) -> str | None:
    """Why a layer may compute something else than a product with its weight; `None` if it computes that."""
    kind = type(layer)
    tensors = {**layer._parameters, **layer._buffers}
    unknown = sorted(tensors.keys() - {"weight", "bias"}) + [name for name, _ in layer.named_children()]
    if "weight" not in layer._parameters:
        return f"its weight is made from others ({', '.join(unknown)}), as by weight normalisation; take that off first"
    if unknown:
        return f"it holds more than weight and bias: {', '.join(unknown)}"
    plain = kind.forward in (nn.Linear.forward, nn.Conv2d.forward) or _full_name(kind) in _PLAIN_PRODUCTS
    own_product = getattr(kind, "_conv_forward", None) not in (None, nn.Conv2d._conv_forward)
    if not plain or own_product or kind.__call__ is not nn.Module.__call__ or "forward" in vars(layer):
        return f"{kind.__name__} has a forward of its own, which may be another than the plain product"
    weight = layer._parameters["weight"]
    if isinstance(weight, nn.UninitializedParameter):
        return "it has no weight yet; run the model once before"
    if weight is None or not weight.is_floating_point():
        return f"its weight is {'missing' if weight is None else weight.dtype}; only floating-point ones can be updated"
    if weight.numel() == 1:
        return "it has a single weight, so no entries compete"
    return None


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def numbered_blocks(model: nn.Module) -> set[str]:
    """Names of the modules that are numbered: `blocks.3`, and `s1.b2` beside another `s1.b` of the same class."""
    kinds: dict[tuple[str, str], Counter[type]] = {}
    names = [(*name.rpartition("."), type(module)) for name, module in model.named_modules() if name]
    for parent, _, child, kind in names:
        kinds.setdefault((parent, child.rstrip(_DIGITS)), Counter())[kind] += 1
    found = set()
    for parent, dot, child, kind in names:
        stem = child.rstrip(_DIGITS)
        if not stem or (stem != child and kinds[parent, stem][kind] > 1):
            found.add(parent + dot + child)
    return found


def ancestors(name: str) -> list[str]:
    """Names of the modules that a module lies in, the outermost first: `blocks`, `blocks.3` for `blocks.3.fc1`."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def blocks_of(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The blocks that hold these layers: for each the innermost numbered module with two of them or more.

    For example `layers.0.blocks.1` for `layers.0.blocks.1.mlp.fc1`. Names that are a number come before names that end
    with one, which parts of a block may have as well.
    """
    numbered = numbered_blocks(model)
    around = {layer: [name for name in ancestors(layer) if name in numbered] for layer in layers}
    counts = Counter(name for names in around.values() for name in names)
    found: dict[str, None] = {}
    for names in around.values():
        names = [name for name in names if name.rpartition(".")[2].isdigit()] or names
        inner = [name for name in names if counts[name] > 1] or names
        if inner:
            found[inner[-1]] = None
    return list(found)


def layer_config(name: str, config: SnellConfig) -> SnellConfig:
    """The settings of one layer: those of the first matching pattern in place of the general ones."""
    changes: dict[str, Any] = {}
    for setting in ("rank", "sparsity", "dropout"):
        patterns = getattr(config, f"{setting}_pattern")
        pattern = matching(patterns, name)
        if pattern is not None:
            changes[setting] = patterns[pattern]
    return replace(config, **changes)


def matching(patterns: Iterable[str], name: str) -> str | None:
    """The first of these patterns that is found in a name; wrappers' parts of it do not count."""
    return next((pattern for pattern in patterns if re.search(pattern, plain_name(name))), None)


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
            names = adaptable_layers(model)
        raise UserError(f"{setting} pattern {idle[0]!r} matches nothing; there is for example {some(names)}")
