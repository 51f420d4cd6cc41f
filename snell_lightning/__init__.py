"""Fine-tune pretrained vision backbones with SNELL: sparse tuning with kernelized LoRA, in PyTorch Lightning."""

from typing import TYPE_CHECKING, Any

from snell_lightning.adapters import (
    SnellConfig,
    UserError,
    adapter_state_dict,
    inject,
    load_adapter,
    load_adapter_state_dict,
    merge,
    save_adapter,
)

if TYPE_CHECKING:
    from snell_lightning.data import ImageDataModule
    from snell_lightning.module import ImageClassifier

__all__ = [
    "ImageClassifier",
    "ImageDataModule",
    "SnellConfig",
    "UserError",
    "adapter_state_dict",
    "inject",
    "load_adapter",
    "load_adapter_state_dict",
    "merge",
    "save_adapter",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The Lightning side is imported when it is first asked for: the adapters alone need only torch.
    if name == "ImageClassifier":
        from snell_lightning.module import ImageClassifier

        return ImageClassifier
    if name == "ImageDataModule":
        from snell_lightning.data import ImageDataModule

        return ImageDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
