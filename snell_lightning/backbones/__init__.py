"""Backbones: timm models, the one that ships with the package, and what timm knows about them."""

from snell_lightning.backbones.create import create_backbone, data_config
from snell_lightning.backbones.embedded import EMBEDDED_BACKBONE

__all__ = ["EMBEDDED_BACKBONE", "create_backbone", "data_config"]
