"""Planned memory of a training step against memory that is counted while the step is run, on the CPU.

    pip install -e '.[bench]'
    python -m benchmarks.memory_plan --backbones vit_small_patch16_224,convnext_tiny --batch 4 --rank 8

Each combination of a backbone, a method (SNELL with each way to recompute, with frozen weights in bf16 besides, LoRA,
full fine-tuning) and a precision is planned by `snell_lightning.memory` on fake tensors, and then run: the model is
built by `benchmarks.methods`, with Hugging Face peft's LoRA, and every live storage is counted during its second step.
Both follow Lightning's order, where the gradients of the step before live until forward is over. `error` is
planned / counted - 1; `seconds` is what a plan took, the model's construction included.

`--plan-only` adds backbones that are planned and not run, at the same batch size. Writes
`benchmarks/results/memory_plan.json`, or --output.
"""

import argparse
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import RESULTS, environment, mebibytes, print_table, write_result
from benchmarks.methods import Backbone, Settings, Subject, Variant, build, parse_variants
from snell_lightning.adapters import SnellConfig
from snell_lightning.memory import Job, Planner, StorageTracker
from snell_lightning.memory.job import forward_context

BACKBONES = (
    "vit_small_patch16_224",
    "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
)
METHODS = (
    "snell:recompute=none",
    "snell:recompute=inputs",
    "snell:recompute=blocks",
    "snell:recompute=blocks:backbone_dtype=bfloat16",
    "lora",
    "full",
)
_PRECISIONS = {"fp32": "32-true", "bf16-mixed": "bf16-mixed"}


def describe(variant: Variant, backbone: str, classes: int) -> Job:
    """The job that a variant is, for the planner."""
    settings = variant.settings
    named = {name: getattr(settings, name) for name in ("rank", "sparsity", "dropout", "drop_path")}
    if variant.method == "lora":
        named["dropout"] = settings.lora_dropout
    adapter = SnellConfig(recompute=settings.recompute, **named, **settings.others)
    method: Any = variant.method
    return Job(backbone, classes, adapter, method, _PRECISIONS[settings.precision], settings.backbone_dtype)


def planned(job: Job, batch: int) -> tuple[int, float]:
    """Peak bytes, and the seconds it took to know them."""
    start = time.perf_counter()
    peak = Planner(job).plan(batch).peak
    return peak, time.perf_counter() - start


def counted(subject: Subject, precision: str) -> int:
    """Peak bytes of a step that follows another."""
    for module in subject.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # As the package trains: frozen statistics stay.
            module.train(any(parameter.requires_grad for parameter in module.parameters()))

    def step() -> None:
        with forward_context(_PRECISIONS[precision]):
            loss = F.cross_entropy(subject.model(subject.images), subject.labels)
        subject.optimizer.zero_grad()
        loss.backward()
        subject.optimizer.step()

    step()
    gc.collect()
    state = [value for held in subject.optimizer.state.values() for value in held.values() if torch.is_tensor(value)]
    with StorageTracker(subject.model, subject.images, subject.labels, *state) as tracker:
        step()
    return tracker.peak


def compare(backbone: str, variant: Variant, classes: int, batch: int) -> dict[str, Any]:
    """One line of the result."""
    peak, seconds = planned(describe(variant, backbone, classes), batch)
    subject = build(variant, Backbone(backbone, classes), batch, torch.device("cpu"))
    truth = counted(subject, variant.settings.precision)
    return {
        "backbone": backbone,
        "method": variant.label,
        "precision": variant.settings.precision,
        "planned": peak,
        "counted": truth,
        "error": round(peak / truth - 1, 5),
        "seconds": round(seconds, 2),
    }


def only_plan(backbone: str, variant: Variant, classes: int, batch: int) -> dict[str, Any]:
    """One line of the result, of a step that is not run."""
    peak, seconds = planned(describe(variant, backbone, classes), batch)
    model = timm.create_model(backbone, pretrained=False, num_classes=classes, device="meta")
    return {
        "backbone": backbone,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "method": variant.label,
        "precision": variant.settings.precision,
        "planned": peak,
        "seconds": round(seconds, 2),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan, count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default=",".join(BACKBONES), help="timm names, separated by commas")
    parser.add_argument("--plan-only", default="", help="timm names that are planned and not run")
    parser.add_argument("--methods", default=",".join(METHODS), help="variants as in benchmarks.step")
    parser.add_argument("--precisions", default="fp32,bf16-mixed", help="of fp32 and bf16-mixed")
    parser.add_argument("--batch", type=int, default=4, help="images in a batch")
    parser.add_argument("--rank", type=int, default=8, help="columns of the factors")
    parser.add_argument("--classes", type=int, default=100, help="outputs of the head")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_plan.json")
    options = parser.parse_args(arguments)

    rows: list[dict[str, Any]] = []
    large: list[dict[str, Any]] = []
    for precision in options.precisions.split(","):
        for variant in parse_variants(options.methods, Settings(precision=precision, rank=options.rank)):
            for backbone in options.backbones.split(","):
                rows.append(compare(backbone, variant, options.classes, options.batch))
            for backbone in filter(None, options.plan_only.split(",")):
                large.append(only_plan(backbone, variant, options.classes, options.batch))

    columns = ("backbone", "method", "precision", "planned MiB", "counted MiB", "error", "seconds")
    print_table(f"Planned and counted peaks, batch {options.batch}", columns, [_cells(row) for row in rows])
    worst = max((abs(row["error"]) for row in rows), default=0.0)
    print(f"largest error: {worst:.2%}")
    if large:
        columns = ("backbone", "method", "precision", "planned MiB", "parameters", "seconds")
        print_table(f"Planned alone, batch {options.batch}", columns, [_cells(row) for row in large])
    result = {
        **environment(torch.device("cpu")),
        "batch": options.batch,
        "rank": options.rank,
        "classes": options.classes,
        "largest_error": worst,
        "rows": rows,
        "plan_only": large,
    }
    write_result(options.output, result)


def _cells(row: dict[str, Any]) -> list[Any]:
    head = [row["backbone"], row["method"], row["precision"], mebibytes(row["planned"])]
    if "parameters" in row:
        return [*head, f"{row['parameters']:,}", f"{row['seconds']:.1f}"]
    return [*head, mebibytes(row["counted"]), f"{row['error']:+.2%}", f"{row['seconds']:.1f}"]


if __name__ == "__main__":
    main()
