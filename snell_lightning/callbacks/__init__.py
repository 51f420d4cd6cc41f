"""Callbacks: what watches a run, and what is saved of it."""

from snell_lightning.callbacks.average import AdapterEMA
from snell_lightning.callbacks.budget import LayerBudget
from snell_lightning.callbacks.checkpoint import AdapterCheckpoint
from snell_lightning.callbacks.finite import FiniteLoss
from snell_lightning.callbacks.monitor import SnellMonitor
from snell_lightning.callbacks.predictions import PredictionWriter
from snell_lightning.callbacks.report import ClassReport

__all__ = [
    "AdapterCheckpoint",
    "AdapterEMA",
    "ClassReport",
    "FiniteLoss",
    "LayerBudget",
    "PredictionWriter",
    "SnellMonitor",
]
