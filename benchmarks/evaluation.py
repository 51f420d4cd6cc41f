"""Throughput of evaluation: a model with SNELL's adapters beside the plain timm model.

    python -m benchmarks.evaluation --backbone vit_base_patch16_224 --batch 8

Both models have the same random weights and run in evaluation mode under `torch.inference_mode`, in turns A B A B, in
fp32 and under autocast to bf16. The adapted model makes its updates once, as in an evaluation by Lightning; a round
that is not counted comes first. Writes `benchmarks/results/evaluation-BACKBONE-BATCH.json`, or --output.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    RESULTS,
    environment,
    in_turns,
    median,
    pick_device,
    print_table,
    ratio,
    seconds,
    write_result,
)
from benchmarks.methods import PRECISIONS, Backbone, Settings, autocast, make_model, parse_variants
from snell_lightning.adapters import updates_made_once


def evaluate(model: nn.Module, images: Tensor, precision: str) -> None:
    """One batch."""
    with torch.inference_mode(), autocast(images.device, precision):
        model(images)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backbone", default="vit_base_patch16_224", help="timm name; its weights are random")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", help="by default the accelerator, if there is one")
    parser.add_argument("--image-size", type=int, help="pixels; by default the model's own")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--blocks", type=int, help="keep only the first so many blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write and return the result."""
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    backbone = Backbone(arguments.backbone, arguments.classes, arguments.image_size, arguments.blocks, arguments.seed)
    images, _ = backbone.images(arguments.batch, device)
    snell, plain = parse_variants("snell,full", Settings(rank=arguments.rank, sparsity=arguments.sparsity))
    models = {
        "plain": make_model(plain, backbone, device).eval(),
        "snell": make_model(snell, backbone, device).eval(),
    }

    precisions: dict[str, Any] = {}
    for precision in arguments.precisions:
        jobs = {
            name: lambda model=model, precision=precision: seconds(lambda: evaluate(model, images, precision), device)
            for name, model in models.items()
        }
        with updates_made_once(models["snell"]):
            times = in_turns(jobs, arguments.rounds, arguments.warmup)
        medians = {name: median(values) for name, values in times.items()}
        precisions[precision] = {
            "seconds": times,
            "median_seconds": medians,
            "images_per_second": {name: round(arguments.batch / value, 3) for name, value in medians.items()},
            "throughput_ratio": ratio(medians["plain"], medians["snell"]),
        }

    result: dict[str, Any] = {
        "what": f"evaluation of {arguments.backbone}, batch {arguments.batch}: with SNELL's adapters, and plain",
        "environment": environment(device),
        "arguments": {name: value for name, value in vars(arguments).items() if name != "output"},
        "precisions": precisions,
    }
    name = f"evaluation-{arguments.backbone}-{arguments.batch}.json".replace("/", "-")
    write_result(arguments.output or RESULTS / name, result)
    rows = [
        [precision, *found["images_per_second"].values(), found["throughput_ratio"]]
        for precision, found in precisions.items()
    ]
    print_table(f"{result['what']}; images a second", ["precision", "plain", "snell", "snell / plain"], rows)
    return result


if __name__ == "__main__":
    run()
