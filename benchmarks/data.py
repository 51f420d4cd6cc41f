"""How fast JPEG files become batches: this package, timm's loader and plain torchvision, in turns.

    python -m benchmarks.data

Images of 500 x 375 pixels with a photograph's spectrum, in class folders in the disk's cache, are read with random
crops to 224 pixels, flips and normalisation (training), and with a centre crop (evaluation); small ones of 64 x 64 are
taken whole. All three read by Pillow, crop bicubically and give normalised fp32 tensors. Each pass is over all images:
in one process (images a second on one core), and with two workers. Besides: the time from one epoch's last batch to the
next one's first with two workers, and how many images a second `check-data` looks at. Writes `results/data.json`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from benchmarks.common import RESULTS, environment, in_turns, median, print_table, ratio, write_result
from snell_lightning.data import ImageDataModule
from snell_lightning.data.check import check

RESULT = RESULTS / "data.json"
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
BATCH = 32


def photograph(number: int, width: int, height: int) -> Image.Image:
    """Noise whose detail falls as a photograph's does: octaves of decreasing strength."""
    draw = np.random.default_rng(number)
    pixels = np.full((height, width, 3), 128.0)
    cells, strength = 3, 70.0
    while cells < max(width, height):
        patches = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layer = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
        pixels += (layer - 128) / 128 * strength
        cells, strength = cells * 2, strength * 0.55
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def folder(root: Path, images: int, width: int, height: int) -> Path:
    """Images in the folders of four classes, half of them to train on."""
    for number in range(2 * images):
        path = root / ("train" if number < images else "val") / f"class{number % 4}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(number, width, height).save(path, quality=90)
    return root


def ours(root: Path, size: int, whole: bool, training: bool, workers: int) -> Callable[[], Iterable[Any]]:
    """This package's loader."""
    data = ImageDataModule(
        "folder", str(root), image_size=size, batch_size=BATCH, num_workers=workers, crop_pct=0.875,
        normalization="inception", augmentation="none" if whole else "crop",
    )  # fmt: skip
    loader = data.train_dataloader() if training else data.val_dataloader()
    return lambda: loader


def timms(root: Path, size: int, whole: bool, training: bool, workers: int) -> Callable[[], Iterable[Any]]:
    """timm's, without its prefetcher, which needs an accelerator."""
    dataset = create_dataset("", str(root / ("train" if training else "val")))
    loader = create_loader(
        dataset, (3, size, size), BATCH, is_training=training, no_aug=whole, use_prefetcher=False, num_workers=workers,
        mean=MEAN, std=STD, interpolation="bicubic", crop_pct=1.0 if whole else 0.875, color_jitter=0.0,
        scale=(0.08, 1.0), pin_memory=False, persistent_workers=workers > 0, crop_mode="squash" if whole else None,
    )  # fmt: skip
    return lambda: loader


def torchvisions(root: Path, size: int, whole: bool, training: bool, workers: int) -> Callable[[], Iterable[Any]]:
    """Torchvision's folder and transforms with torch's loader, as in its tutorials."""
    bicubic = transforms.InterpolationMode.BICUBIC
    if whole:
        steps: list[Any] = [transforms.Resize((size, size), bicubic)]
    elif training:
        steps = [transforms.RandomResizedCrop(size, interpolation=bicubic), transforms.RandomHorizontalFlip()]
    else:
        steps = [transforms.Resize(int(size / 0.875), bicubic), transforms.CenterCrop(size)]
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    dataset = datasets.ImageFolder(str(root / ("train" if training else "val")), transforms.Compose(steps))
    loader = DataLoader(dataset, BATCH, shuffle=training, num_workers=workers, persistent_workers=workers > 0)
    return lambda: loader


LOADERS = {"ours": ours, "timm": timms, "torchvision": torchvisions}
# Pixels of the files, of what the model is given, and whether images are taken whole.
TASKS = {
    "photographs, training": ((500, 375), 224, False, True),
    "photographs, evaluation": ((500, 375), 224, False, False),
    "small, whole": ((64, 64), 64, True, True),
}


def images_a_second(loader: Callable[[], Iterable[Any]]) -> float:
    """Of one pass."""
    start = time.perf_counter()
    count = sum(len(batch[0]) for batch in loader())
    return count / (time.perf_counter() - start)


def between_epochs(loader: Callable[[], Iterable[Any]], epochs: int = 5) -> float:
    """Seconds from asking for an epoch to its first batch, where the epoch before has been read."""
    waits = []
    for _ in range(epochs + 1):
        start = time.perf_counter()
        batches = iter(loader())
        next(batches)
        waits.append(time.perf_counter() - start)
        for _ in batches:
            pass
    return statistics.median(waits[1:])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULT)
    chosen = parser.parse_args()
    torch.set_num_threads(1)

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for task, ((width, height), size, whole, training) in TASKS.items():
            root = Path(name) / f"{width}x{height}"
            if not root.is_dir():
                folder(root, chosen.images, width, height)
            for workers in (0, 2):
                loaders = {key: make(root, size, whole, training, workers) for key, make in LOADERS.items()}
                passes = in_turns(
                    {key: (lambda each=each: images_a_second(each)) for key, each in loaders.items()}, chosen.rounds
                )
                key = f"{task}, {'one process' if not workers else f'{workers} workers'}"
                found[key] = {name: median(values) for name, values in passes.items()}
                if workers:
                    waits = {name: round(between_epochs(each), 4) for name, each in loaders.items()}
                    found[f"{task}, seconds to an epoch's first batch"] = waits
        data = ImageDataModule("folder", str(Path(name) / "64x64"), image_size=64)
        checks = [check(data.splits, 64, workers=2) for _ in range(chosen.rounds)]
        looked_at = median([each.looked_at / each.seconds for each in checks])

    rows = [[key, *values.values(), ratio(values["ours"], values["timm"])] for key, values in found.items()]
    print_table("images a second", ["", *LOADERS, "ours / timm"], rows)
    print(f"check-data, 64 x 64, 2 workers: {looked_at:,.0f} images a second")
    write_result(
        chosen.output,
        {
            "images": chosen.images,
            "rounds": chosen.rounds,
            "batch": BATCH,
            "median images a second": found,
            "check-data, images a second, 2 workers": looked_at,
            "environment": environment(torch.device("cpu")),
        },
    )


if __name__ == "__main__":
    main()
