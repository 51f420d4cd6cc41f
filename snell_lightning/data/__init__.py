"""Data: one DataModule, one small file per source, transforms from the backbone's own configuration."""

from snell_lightning.data.datamodule import SOURCES, ImageDataModule
from snell_lightning.data.splits import Source, Splits
from snell_lightning.data.transforms import Normalization, build_transforms

__all__ = ["SOURCES", "ImageDataModule", "Normalization", "Source", "Splits", "build_transforms"]
