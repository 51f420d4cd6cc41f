"""Data: one DataModule, one small file per source, transforms from the backbone's own configuration."""

from typing import TYPE_CHECKING, Any

from snell_lightning.data.splits import Source, Splits
from snell_lightning.data.transforms import Normalization, build_transforms

if TYPE_CHECKING:
    from snell_lightning.data.datamodule import ImageDataModule
    from snell_lightning.data.sources import SOURCES

__all__ = ["SOURCES", "ImageDataModule", "Normalization", "Source", "Splits", "build_transforms"]


def __getattr__(name: str) -> Any:
    # Lightning is imported where there is a run: a tuned model is used without it.
    if name in ("SOURCES", "ImageDataModule"):
        from snell_lightning.data import datamodule, sources

        return getattr(sources if name == "SOURCES" else datamodule, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
