"""Backbones: timm models, the one that ships with the package, and what timm knows about them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snell_lightning.backbones.create import create_backbone, data_config, require_image_size

__all__ = ["EMBEDDED_BACKBONE", "create_backbone", "data_config", "require_image_size"]

EMBEDDED_BACKBONE = "vit_micro_patch4_32.mnist5k"
"""Name of the backbone that ships with the package; `embedded.py` describes it."""


def __getattr__(name: str) -> Any:
    # timm is imported when a backbone is first asked for: the name alone is the default of model and data.
    if name in ("create_backbone", "data_config", "require_image_size"):
        from snell_lightning.backbones import create

        return getattr(create, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
