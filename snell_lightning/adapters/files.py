"""Adapter files: safetensors with the trained tensors alone, and metadata that says what they belong to.

The metadata has one JSON value per key: `format`, `config` (of the adapter), `backbone`, `fingerprint` (of the frozen
weights), and whatever the writer adds, such as `classes` and `normalization`. Reading one runs no code from it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from snell_lightning.adapters.config import SnellConfig
from snell_lightning.adapters.errors import UserError
from snell_lightning.adapters.finding import layer_config
from snell_lightning.adapters.injection import (
    adapter_state_dict,
    check_adapter_state_dict,
    deltas,
    freeze_all_but_head,
    inject,
    load_adapter_state_dict,
    set_sparsity,
    set_value_updates,
    shared_sparsity,
    value_updates,
)
from snell_lightning.adapters.layers.linear import SnellLinear
from snell_lightning.adapters.names import plain_name, unwrapped
from snell_lightning.adapters.whole import whole

FORMAT = "snell_lightning.adapter/1"


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the frozen tensors: names, types, shapes and contents of all that `adapter_state_dict` leaves out."""
    trained = adapter_state_dict(model).keys()
    digest = hashlib.sha256()
    tensors = {plain_name(name): tensor for name, tensor in unwrapped(model).state_dict().items()}
    for name, tensor in sorted(tensors.items()):
        if name not in trained:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_adapter(
    path: str | Path,
    model: nn.Module,
    config: SnellConfig | None,
    backbone: str,
    frozen: str | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    **metadata: Any,
) -> None:
    """Write the trained tensors of a model; a file of that name is replaced only once the new one is whole.

    Args:
        path: The file to write; its folder is made.
        model: A model that `inject` adapted.
        config: The settings it was injected with; None where only the head is trained.
        backbone: Name by which the backbone can be created again.
        frozen: `fingerprint(model)` where it is known already.
        tensors: The trained tensors, if they are not those that the model has now.
        **metadata: Further values, anything that JSON can hold.
    """
    values = {
        "format": FORMAT,
        "config": None if config is None else asdict(config),
        "backbone": backbone,
        "fingerprint": frozen or fingerprint(model),
        **metadata,
    }
    if shared := shared_sparsity(model):
        values["shared_sparsity"] = shared
    if averaged := value_updates(model):
        values["value_updates"] = averaged
    trained = adapter_state_dict(model) if tensors is None else tensors
    written = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
    with whole(path) as part:
        # safetensors' own writing raises errors of another kind, and lets its files be read by their owner alone.
        part.write_bytes(save(written, metadata={key: json.dumps(value) for key, value in values.items()}))


def read_adapter(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an adapter file, and its metadata.

    Raises:
        UserError: There is no such file, or it is not an adapter file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no adapter file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not an adapter file: {str(error).splitlines()[0]}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not an adapter file of this package: its format is {metadata.get('format')!r}")
    absent = {"config", "backbone", "fingerprint"} - metadata.keys()
    if absent:
        raise UserError(f"{path} is not a whole adapter file: its metadata lacks {', '.join(sorted(absent))}")
    return tensors, metadata


def _check_settings(path: str | Path, model: nn.Module, config: SnellConfig) -> None:
    """Raise where a layer would make another update of the file's factors than the one that was tuned."""
    for name, layer in unwrapped(model).named_modules():
        if isinstance(layer, SnellLinear):
            name = plain_name(name)
            expected = layer_config(name, config)
            for setting in ("kernel", "sparsifier", "sparsity", "pieces", "scale", "rank"):
                wanted, given = getattr(expected, setting), getattr(layer.config, setting)
                if wanted != given:
                    raise UserError(
                        f"{path} was tuned with {setting} {wanted} at {name}, and the model was injected with {given}; "
                        "give the adapter the file's settings"
                    )


def load_adapter(path: str | Path, model: nn.Module, backbone: str | None = None) -> dict[str, Any]:
    """Load an adapter file into the backbone that it was made for.

    Args:
        path: The file.
        model: The backbone, plain or already injected with the file's settings. A plain one is injected.
        backbone: The name it was created by; if given, it must be the file's.

    Returns:
        The file's metadata.

    Raises:
        UserError: The file belongs to another backbone or other frozen weights, or its tensors do not fit the model.
    """
    tensors, metadata = read_adapter(path)
    tensors = {plain_name(name): tensor for name, tensor in tensors.items()}
    if backbone is not None and metadata["backbone"] != backbone:
        raise UserError(f"{path} belongs to the backbone {metadata['backbone']!r}, not to {backbone!r}")
    config = None if metadata["config"] is None else SnellConfig(**metadata["config"])
    if config is not None:
        if not deltas(model):
            inject(model, config)
        _check_settings(path, model, config)
    else:
        freeze_all_but_head(model)
    check_adapter_state_dict(model, tensors)
    if fingerprint(model) != metadata["fingerprint"]:
        raise UserError(
            f"{path} was made on other frozen weights of {metadata['backbone']!r} than the model has; "
            "create the backbone with the same pretrained weights"
        )
    load_adapter_state_dict(model, tensors)
    set_sparsity(model, metadata.get("shared_sparsity", {}))
    set_value_updates(model, metadata.get("value_updates", ()))
    return metadata
