"""A folder of real images, and adapters of the embedded backbone with which to classify them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from snell_lightning import ImageClassifier, ImageDataModule, SnellConfig, save_adapter
from snell_lightning.adapters import deltas

CONFIG = SnellConfig(rank=4, sparsity=0.5, scale=0.4)
IMAGES = 40


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder CLASS/IMAGE of scikit-learn's digits as PNG files, four of each."""
    folder = tmp_path_factory.mktemp("photos")
    digits = load_digits()
    for label in range(10):
        (folder / f"digit {label}").mkdir()
        for number, pixels in enumerate(digits.images[digits.target == label][:4]):
            image = Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).resize((40, 36))
            image.save(folder / f"digit {label}" / f"{number}.png")
    return folder


def tuned(folder: Path, seed: int = 0, config: SnellConfig | None = CONFIG, **settings: object) -> ImageClassifier:
    """A classifier whose every trained tensor is drawn: an update as large as the weights."""
    data = ImageDataModule("folder", str(folder), augmentation=settings.pop("augmentation", "crop"))
    torch.manual_seed(seed)
    module = ImageClassifier(num_classes=data.num_classes, adapter=config, image_size=data.image_size, **settings)
    for delta in deltas(module.model).values():
        torch.nn.init.normal_(delta.in_factors)
        torch.nn.init.normal_(delta.out_factors)
    torch.nn.init.normal_(module.model.get_classifier().weight)
    module.class_names = data.class_names
    return module.eval()


def save(path: Path, module: ImageClassifier, folder: Path, augmentation: str = "crop") -> Path:
    """Its adapter file, as `fit` writes one."""
    data = ImageDataModule("folder", str(folder), augmentation=augmentation)
    save_adapter(
        path, module.model, module.adapter_config, module.backbone_name, num_classes=module.num_classes,
        backbone_args=module.backbone_args, pretrained=module.pretrained, weights=module.weights, **data.settings(),
    )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def adapter(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter file."""
    return save(tmp_path_factory.mktemp("run") / "adapter.safetensors", tuned(photos), photos)
