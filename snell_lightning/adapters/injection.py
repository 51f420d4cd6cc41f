"""Put adapters into a model, take them out again, and read or write what is trained.

`inject` replaces layers in place and freezes the rest; `merge` adds the updates to the weights and puts the plain
layers back. Which parameters are an adapter's is not guessed from their names: a module that has some says so
(`AdapterModule`).
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from snell_lightning.adapters.config import SnellConfig
from snell_lightning.adapters.errors import UserError, some
from snell_lightning.adapters.finding import (
    adaptable_layers,
    blocks_of,
    check_all_matched,
    find_targets,
    heads,
    layer_config,
    matching,
)
from snell_lightning.adapters.guards import guard, unguard
from snell_lightning.adapters.layers.attention import close_attention, open_attention
from snell_lightning.adapters.layers.calls import call_layers, call_no_layers
from snell_lightning.adapters.layers.linear import SnellLinear
from snell_lightning.adapters.layers.recompute import keep_everything, rebuild_inputs, recompute_blocks
from snell_lightning.adapters.names import plain_name, unwrapped
from snell_lightning.adapters.projections import divide
from snell_lightning.adapters.statistics import freeze_statistics, release_statistics, trained_statistics
from snell_lightning.adapters.update.delta import SnellDelta
from snell_lightning.adapters.update.shared import SharedThresholds

_log = logging.getLogger(__name__)

# timm's attention with separate q and v biases reads `qkv.weight` and bypasses the layer, unless this attribute is set.
_CALLS_QKV = "qkv_bias_separate"


@runtime_checkable
class AdapterModule(Protocol):
    """A module that knows which of its own parameters are the adapter's."""

    def adapter_params(self) -> list[str]:
        """Names of parameters registered on this very module."""


def inject(model: nn.Module, config: SnellConfig, example: Any = None) -> list[str]:
    """Adapt the layers of a model in place, and freeze everything else but the head and `train_also`.

    q, k and v compete each among themselves, however a layer holds them; a layer in which projections cannot be told
    apart competes as one, and is named in a warning. The head is what timm names as the model's classifier; it is never
    adapted and always trained. A model without such information has no head of its own kind: name its parameters in
    `train_also`.

    Args:
        model: A timm model, or any module whose layers `config.targets` names.
        config: Settings, and which layers.
        example: What the model is called with, a tensor or a tuple of arguments; it is run on the shapes alone, to see
            which rows of a fused layer are q, k and v. By default images of the size that the model names.

    Returns:
        Names of the adapted layers, in the model's order; `explain` says of each layer why.

    Raises:
        UserError: There is no layer to adapt, a named one cannot be adapted, a pattern matches nothing, the model does
            not run on the example, or it has adapters already or parameters without values. The model is as it was.
    """
    model = unwrapped(model)
    if any(isinstance(module, SnellLinear) for module in model.modules()):
        raise UserError("the model has adapters already; call merge(model) before injecting others")
    lazy = [name for name, parameter in model.named_parameters() if isinstance(parameter, nn.UninitializedParameter)]
    if lazy:
        raise UserError(f"{lazy[0]} has no values yet; run the model once before injecting adapters")
    open_attention(model)
    reset: set[nn.Module] = set()
    uncalled: set[str] = set()
    values: set[tuple[str, int]] = set()
    try:
        targets = find_targets(model, config)
        close_attention(model, targets.values())
        extra = _extra_parameters(model, config)
        reset = _have_qkv_called(model, targets)
        parts = divide(model, adaptable_layers(model), targets, example, uncalled, values)
    except UserError:
        for module in reset:
            setattr(module, _CALLS_QKV, False)
        close_attention(model)
        raise

    head_parameters = {id(parameter) for head in heads(model).values() for parameter in head.parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in head_parameters or name in extra)
    freeze_statistics(model)
    adapted = {
        id(layer): SnellLinear(
            layer,
            layer_config(name, config),
            parts[name] or 1,
            len(targets),
            {place for of, place in values if of == name},
        )
        for name, layer in targets.items()
    }
    shared = SharedThresholds()
    for layer in adapted.values():
        layer.thresholds = shared
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if id(child) in adapted:
                setattr(parent, child_name, adapted[id(child)])
                if parent in reset:
                    adapted[id(child)].restore_on_merge = {_CALLS_QKV: False}
    by_name = {name: adapted[id(layer)] for name, layer in targets.items()}
    for name in uncalled & by_name.keys():
        by_name[name].uncalled = True
    call_layers(model, by_name)
    guard(model, by_name)
    if config.recompute != "none":
        rebuild_inputs(model)
    if config.recompute == "blocks":
        recompute_blocks(model, blocks_of(model, targets))
    unknown = [name for name, rows in parts.items() if rows is None]
    if unknown:
        _log.warning(
            f"{some(unknown)}: each competes as one, since it could not be seen whether it holds several projections; "
            "give inject an example of what the model is called with"
        )
    _log.info(f"{len(targets)} layers are adapted ({some(targets)}); explain(model, config) says why")
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
    plain = {id(module): module.merged() for module in model.modules() if isinstance(module, SnellLinear)}
    _put_back(model, plain)
    if plain and any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in model.parameters()):
        model.float()
    return model


def take_off(model: nn.Module) -> None:
    """Put the plain layers back without their updates, in place.

    Nothing is copied or computed, and the adapted layers stay whole, so that whoever holds them can put them on again.
    """
    _put_back(model, {id(module): module.plain() for module in model.modules() if isinstance(module, SnellLinear)})


def _put_back(model: nn.Module, plain: Mapping[int, nn.Module]) -> None:
    """Undo `inject`, with a plain layer for each adapted one, by its identity."""
    unguard(model)
    call_no_layers(model.modules())
    keep_everything(model)
    release_statistics(model)
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, SnellLinear):
                setattr(parent, child_name, plain[id(child)])
                for attribute, value in child.restore_on_merge.items():
                    setattr(parent, attribute, value)
    close_attention(model)


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


def freeze_all_but_head(model: nn.Module) -> None:
    """Leave only the classifier trainable: a linear probe.

    Raises:
        UserError: The model does not say what its classifier is.
    """
    model.requires_grad_(False)
    model = unwrapped(model)
    found = heads(model)
    if not found:
        raise UserError("the backbone names no classifier, so without an adapter there is nothing to train")
    for head in found.values():
        head.requires_grad_(True)
    freeze_statistics(model)


def deltas(model: nn.Module) -> dict[str, SnellDelta]:
    """All updates of a model by name, in its order: `blocks.0.attn.qkv.deltas.0` updates the first block's q."""
    modules = unwrapped(model).named_modules()
    return {plain_name(name): module for name, module in modules if isinstance(module, SnellDelta)}


def shared_sparsity(model: nn.Module) -> dict[str, float]:
    """The sparsity of those updates, by name, that a budget has given another one than their settings."""
    return {name: delta.sparsity for name, delta in deltas(model).items() if delta.sparsity != delta.config.sparsity}


def set_sparsity(model: nn.Module, shared: Mapping[str, float]) -> None:
    """Give updates the sparsity of their settings, or the one that `shared_sparsity` gave.

    Raises:
        UserError: The model has no update of one of the names.
    """
    own = deltas(model)
    if unknown := shared.keys() - own.keys():
        raise UserError(f"the model has no update {some(unknown)}; was it injected with the same settings?")
    for name, delta in own.items():
        delta.sparsity = shared.get(name, delta.config.sparsity)


def value_updates(model: nn.Module) -> list[str]:
    """The updates, by name, of projections that attention averages, which the automatic scale makes smaller."""
    return [name for name, delta in deltas(model).items() if delta.of_values and delta.config.scale == "auto"]


def set_value_updates(model: nn.Module, names: Collection[str]) -> None:
    """Have the updates the scale that they were tuned with: of `value_updates`, whatever is seen of the model here.

    Raises:
        UserError: The model has no update of one of the names.
    """
    own = deltas(model)
    if unknown := set(names) - own.keys():
        raise UserError(f"the model has no update {some(sorted(unknown))}; was it injected with the same settings?")
    for name, delta in own.items():
        if delta.of_values != (name in names):
            delta.of_values = not delta.of_values


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's own parameters, by their name in the model; the head is not among them."""
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, AdapterModule):
            for local in module.adapter_params():
                yield plain_name(f"{name}.{local}" if name else local), getattr(module, local)


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What tuning makes: the adapter's tensors and every other trainable one, such as the head, by their names.

    With a trained normalisation come its running statistics. Names are the plain model's, also where it is compiled or
    trained in several processes.

    Returns:
        Detached tensors that share the parameters' memory.
    """
    model = unwrapped(model)
    wanted = {name for name, _ in adapter_parameters(model)}
    parameters = ((plain_name(name), parameter) for name, parameter in model.named_parameters())
    tuned = {name: parameter.detach() for name, parameter in parameters if parameter.requires_grad or name in wanted}
    return tuned | {plain_name(name): statistic for name, statistic in trained_statistics(model)}


@torch.no_grad()
def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy what `adapter_state_dict` gave into a model that was injected with the same settings.

    Raises:
        UserError: A tensor is missing, not expected, or of another shape. Nothing has been copied then.
    """
    state = {plain_name(name): tensor for name, tensor in state.items()}
    check_adapter_state_dict(model, state)
    for name, tensor in adapter_state_dict(model).items():
        tensor.copy_(state[name])


def check_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor], where: str = "the adapter") -> None:
    """Raise `UserError`, naming `where`, unless `state` has just the tensors that the model trains, in their shapes."""
    own = adapter_state_dict(model)
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    if missing:
        raise UserError(f"{where} lacks {some(missing)}; was it made with other settings or another backbone?")
    if unexpected:
        raise UserError(
            f"the model has no place for {some(unexpected)} of {where}; was it injected with the same settings?"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{name} is {tuple(state[name].shape)} in {where} and {tuple(tensor.shape)} in the model; "
                "give the model the settings and the number of classes that it was made with"
            )


def _have_qkv_called(model: nn.Module, targets: Iterable[str]) -> set[nn.Module]:
    """Have timm's attention call its layer, where one is a target; the modules whose attribute was changed for that."""
    changed = set()
    for name in targets:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        if child == "qkv" and getattr(module, _CALLS_QKV, None) is False:
            setattr(module, _CALLS_QKV, True)
            changed.add(module)
    return changed


def _extra_parameters(model: nn.Module, config: SnellConfig) -> set[str]:
    """Names of the backbone's parameters that are trained besides adapter and head."""
    names = [name for name, _ in model.named_parameters()]
    if config.train_also is None:
        return {name for name in names if name.rpartition(".")[2] == "cls_token"}
    used = {pattern for pattern in config.train_also if any(re.search(pattern, name) for name in names)}
    check_all_matched("train_also", config.train_also, used, model, names)
    return {name for name in names if matching(config.train_also, name)}
