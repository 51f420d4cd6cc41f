"""SNELL in pure PyTorch: nothing here imports lightning or timm, and any training loop can use it."""

from snell_lightning.adapters.config import SnellConfig
from snell_lightning.adapters.errors import UserError
from snell_lightning.adapters.files import fingerprint, load_adapter, read_adapter, save_adapter
from snell_lightning.adapters.finding import Choice, explain, heads
from snell_lightning.adapters.injection import (
    AdapterModule,
    adapter_parameters,
    adapter_state_dict,
    cast_frozen,
    check_adapter_state_dict,
    deltas,
    freeze_all_but_head,
    inject,
    load_adapter_state_dict,
    merge,
)
from snell_lightning.adapters.layers.linear import SnellLinear, updates_made_once
from snell_lightning.adapters.statistics import freeze_statistics
from snell_lightning.adapters.switching import AdapterSet
from snell_lightning.adapters.update.delta import SnellDelta

__all__ = [
    "AdapterModule",
    "AdapterSet",
    "Choice",
    "SnellConfig",
    "SnellDelta",
    "SnellLinear",
    "UserError",
    "adapter_parameters",
    "adapter_state_dict",
    "cast_frozen",
    "check_adapter_state_dict",
    "deltas",
    "explain",
    "fingerprint",
    "freeze_all_but_head",
    "freeze_statistics",
    "heads",
    "inject",
    "load_adapter",
    "load_adapter_state_dict",
    "merge",
    "read_adapter",
    "save_adapter",
    "updates_made_once",
]
