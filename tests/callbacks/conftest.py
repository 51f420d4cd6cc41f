"""A classifier small enough to train in a test, and runs of it without the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from snell_lightning import ImageClassifier, SnellConfig

CLASSES = 4


def make_classifier(**arguments: Any) -> ImageClassifier:
    """A small ViT with the same random frozen weights at each call."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "backbone": "test_vit",
        "pretrained": False,
        "backbone_args": {"img_size": 32},
        "num_classes": CLASSES,
        "adapter": SnellConfig(rank=2, sparsity=0.7, targets=[r"attn\.(qkv|proj)"]),
        "warmup": 0.0,
    }
    return ImageClassifier(**{**options, **arguments})


def loader(batches: int, size: int = 2) -> DataLoader:
    """The same batches at each call."""
    random = torch.Generator().manual_seed(0)
    data: list[tuple[Tensor, Tensor]] = [
        (torch.randn(size, 3, 32, 32, generator=random), torch.arange(size) % CLASSES) for _ in range(batches)
    ]
    # Like the package's own loaders it has a generator of its own, and so draws nothing from the main one.
    return DataLoader(data, batch_size=None, generator=random)  # type: ignore[arg-type]


MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    """A function that makes a quiet trainer on the CPU, whose files go below the test's folder."""

    def make(**arguments: Any) -> Trainer:
        options = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path / "run",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "max_epochs": 1,
        }
        return Trainer(**{**options, **arguments})

    return make
