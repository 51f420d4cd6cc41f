"""Fine-tune pretrained vision backbones with SNELL: sparse tuning with kernelized LoRA, in PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snell_lightning.adapters import (
        SnellConfig,
        UserError,
        adapter_state_dict,
        explain,
        inject,
        load_adapter,
        load_adapter_state_dict,
        merge,
        save_adapter,
    )
    from snell_lightning.data import ImageDataModule
    from snell_lightning.inference.classifier import load_classifier
    from snell_lightning.module import ImageClassifier

__all__ = [
    "ImageClassifier",
    "ImageDataModule",
    "SnellConfig",
    "UserError",
    "adapter_state_dict",
    "explain",
    "inject",
    "load_adapter",
    "load_adapter_state_dict",
    "load_classifier",
    "merge",
    "save_adapter",
]
__version__ = "0.1.0"

_ELSEWHERE = {
    "ImageClassifier": "snell_lightning.module",
    "ImageDataModule": "snell_lightning.data",
    "load_classifier": "snell_lightning.inference.classifier",
}


def __getattr__(name: str) -> Any:
    # Nothing is imported before it is asked for: the adapters alone need torch and no lightning, a help text neither.
    if name in __all__:
        return getattr(import_module(_ELSEWHERE.get(name, "snell_lightning.adapters")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
