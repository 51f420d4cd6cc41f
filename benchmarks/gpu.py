"""Everything that only a GPU can tell, in one command: parity, step times, and peak memory beside the plan.

    pip install -e '.[bench]'
    python -m benchmarks.gpu                                  an hour or less on one GPU
    python -m benchmarks.gpu --backbone vit_small_patch16_224 --batches 32 --precisions bf16-mixed

**Parity.** The update, its threshold and its gradients, made by the device's programs, against the same in fp64 on the
CPU, over kernels, sparsifiers and shapes; then the gradients of a whole tuned model in fp32 against the CPU's.

**Time.** For each precision and batch size full fine-tuning, LoRA (peft) and SNELL, as they are and by `torch.compile`,
in turns; medians, and ratios to full fine-tuning as it is. `graphs` is `mode="reduce-overhead"`, by CUDA graphs.

**Memory.** What the allocator says of a step's peak, the model and the optimizer's state included, beside what
`snell_lightning.memory` plans.

What does not fit or fails is written down as such. Writes `benchmarks/results/gpu-NAME.json`, or --out.
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import (
    RESULTS,
    environment,
    in_turns,
    mebibytes,
    median,
    pick_device,
    print_table,
    ratio,
    synchronize,
    write_result,
)
from benchmarks.memory_plan import describe
from benchmarks.methods import Backbone, Settings, Subject, build, parse_variants
from benchmarks.step import timed_step
from snell_lightning.adapters import SnellConfig, SnellDelta
from snell_lightning.adapters.update import triton
from snell_lightning.adapters.update.stack import Stack
from snell_lightning.memory import Planner

METHODS = "full,lora,snell"
SHAPES = ((768, 768), (3072, 768), (768, 3072), (1000, 1000), (37, 130))
MODES: dict[str, dict[str, Any] | None] = {"eager": None, "compiled": {}, "graphs": {"mode": "reduce-overhead"}}


def update_errors(device: torch.device, shapes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Largest errors of update and gradients, over the largest entry of each, against fp64 on the CPU."""
    rows = []
    for kernel in ("distance", "linear"):
        for sparsifier in ("hard", "magnitude", "soft", "none"):
            for shape in shapes:
                torch.manual_seed(0)
                config = SnellConfig(rank=32, kernel=kernel, sparsifier=sparsifier, start="random", scale=0.1)
                delta = SnellDelta(shape[1], shape[0], config)
                grad = torch.randn(shape)
                stacks, updates, thresholds = [], [], []
                for place, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
                    factors = [each.detach().to(place, dtype) for each in (delta.out_factors, delta.in_factors)]
                    stacks.append(Stack([delta.rule], factors))
                    updates.append(torch.empty(shape, device=place, dtype=dtype))
                    thresholds.append(stacks[-1].write(updates[-1], None, 1.0, None))
                ours, exact = (update.cpu().double() for update in updates)
                # An entry next to the threshold may survive in one precision and not in the other.
                flipped = (ours == 0) != (exact == 0)
                ours[flipped], grad[flipped] = exact[flipped], 0.0
                pairs = [(ours, exact)]
                grads = [
                    stack.backward(taus, grad.to(update), None, 1.0, rewrite=False)
                    for stack, taus, update in zip(stacks, thresholds, updates, strict=True)
                ]
                pairs += [(a.cpu().double(), b) for a, b in zip(*grads, strict=True)]
                errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
                rows.append({"kernel": kernel, "sparsifier": sparsifier, "shape": shape, "error": max(errors)})
                rows[-1]["entries that differ in surviving"] = int(flipped.sum())
    return rows


def model_error(device: torch.device, backbone: Backbone, batch: int) -> float:
    """Norm of the difference of a tuned model's gradients from the CPU's, over the latter's, in fp32."""
    (variant,) = parse_variants("snell", Settings())
    found = []
    for place in (device, torch.device("cpu")):
        subject = build(variant, backbone, batch, torch.device("cpu"))
        subject.model.to(place)
        subject.images, subject.labels = subject.images.to(place), subject.labels.to(place)
        subject.forward().backward()
        grads = [p.grad.flatten().cpu().double() for p in subject.model.parameters() if p.grad is not None]
        found.append(torch.cat(grads))
    return ((found[0] - found[1]).norm() / found[1].norm()).item()


def step_times(
    backbone: Backbone, methods: str, settings: Settings, batch: int, modes: Sequence[str], rounds: int, device: Any
) -> list[dict[str, Any]]:
    """Median seconds of a step, by method and mode, all of them in turns; a reason where one does not run."""
    jobs: dict[str, Callable[[], tuple[float, float, float]]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for variant in parse_variants(methods, settings):
        for mode in modes:
            name = f"{variant.label}, {mode}"
            rows[name] = {"method": variant.label, "mode": mode, "batch": batch, "precision": settings.precision}
            try:
                subject = build(variant, backbone, batch, device)
                if (options := MODES[mode]) is not None:
                    subject.model = torch.compile(subject.model, **options)
                for _ in range(3):  # Compiled, and the optimizer's state made.
                    timed_step(subject)
            except Exception as error:  # Out of memory, or a mode that this device or method has not.
                rows[name]["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            jobs[name] = lambda subject=subject: timed_step(subject)
    for name, steps in in_turns(jobs, rounds).items():
        rows[name]["seconds"] = median([sum(step) for step in steps])
    full = next((row.get("seconds") for row in rows.values() if row["method"] == "full"), None)
    for row in rows.values():
        if full and "seconds" in row:
            row["of_full"] = ratio(row["seconds"], full)
    return list(rows.values())


def peaks(
    backbone: Backbone, methods: str, settings: Settings, batch: int, device: torch.device
) -> list[dict[str, Any]]:
    """The allocator's peak of a steady step, and what is planned for it, in bytes."""
    rows = []
    for variant in parse_variants(methods, settings):
        row: dict[str, Any] = {"method": variant.label, "batch": batch, "precision": settings.precision}
        row["planned"] = Planner(describe(variant, backbone.name, backbone.classes)).plan(batch).peak
        gc.collect()
        try:
            row["measured"] = allocated_peak(lambda v=variant: build(v, backbone, batch, device), device)
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        rows.append(row)
    return rows


def allocated_peak(make: Callable[[], Subject], device: torch.device) -> int | None:
    """The allocator's peak of the second step of what is made, above what is there before; None without one."""
    if device.type == "cpu":
        make().step()
        return None
    torch.accelerator.empty_cache()
    before = torch.accelerator.memory_allocated(device)
    subject = make()
    subject.step()
    synchronize(device)
    torch.accelerator.reset_peak_memory_stats(device)
    subject.step()
    synchronize(device)
    return torch.accelerator.max_memory_allocated(device) - before


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write after each part, so that what was measured is kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--precisions", default="fp32,bf16-mixed")
    parser.add_argument("--batches", default="8,32,128")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", help="by default the accelerator, if there is one")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    device = pick_device(arguments.device)
    backbone = Backbone(arguments.backbone, image_size=arguments.image_size)
    about = environment(device)
    name = str(about["device"]["name"]).replace(" ", "-").replace("/", "-")
    out = arguments.out or RESULTS / f"gpu-{name}.json"
    factor: Tensor = torch.zeros(1, device=device)
    result: dict[str, Any] = {"environment": about, "programs": triton.applies(factor), "steps": [], "peaks": []}

    result["parity"] = update_errors(device, SHAPES)
    result["model_error"] = model_error(device, backbone, 2)
    worst = max(row["error"] for row in result["parity"])
    print(f"programs in use: {result['programs']}; update {worst:.1e}, whole model {result['model_error']:.1e} off")
    write_result(out, result)
    for precision in arguments.precisions.split(","):
        settings = Settings(precision=precision, rank=arguments.rank)
        for batch in map(int, arguments.batches.split(",")):
            modes = arguments.modes.split(",")
            result["peaks"] += peaks(backbone, arguments.methods, settings, batch, device)
            result["steps"] += step_times(backbone, arguments.methods, settings, batch, modes, arguments.rounds, device)
            gc.collect()
            write_result(out, result)
    print_table(
        f"{arguments.backbone}: a step",
        ("method", "mode", "precision", "batch", "seconds", "of full"),
        [
            (
                *(row[key] for key in ("method", "mode", "precision", "batch")),
                row.get("seconds", row.get("failed")),
                row.get("of_full", ""),
            )
            for row in result["steps"]
        ],
    )
    print_table(
        f"{arguments.backbone}: peak memory, MiB",
        ("method", "precision", "batch", "planned", "measured"),
        [
            (row["method"], row["precision"], row["batch"], mebibytes(row["planned"]), mebibytes(row.get("measured")))
            for row in result["peaks"]
        ],
    )


if __name__ == "__main__":
    main()
