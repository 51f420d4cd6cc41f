"""Time and memory of one training step, every method in one run and in turns.

    pip install -e '.[bench]'
    python -m benchmarks.step --backbone vit_base_patch16_224 --batch 8 --methods full,linear,lora,snell,straightforward

Methods are separated by commas. After a colon a method takes settings of its own, so that variants of one method can
be compared in one run; the general flags hold for what is not said there:

    python -m benchmarks.step --methods full,snell:recompute=none,snell:recompute=blocks:dropout=0.1
    python -m benchmarks.step --precision bf16-mixed --methods lora:rank=8,snell:rank=8:sparsifier=hard

| method            | settings                                                                             |
|-------------------|--------------------------------------------------------------------------------------|
| `full`            | precision, recompute (none or blocks: timm's checkpointing)                          |
| `linear`          | precision                                                                            |
| `lora`            | precision, rank, recompute (none or blocks), lora_dropout                            |
| `snell`           | precision, backbone_dtype, and every field of `SnellConfig`: rank, sparsity, dropout |
| `straightforward` | precision, rank, sparsity, dropout (0.1 unless it says otherwise), drop_path         |

The flag --recompute is `snell`'s, and so are --dropout and --drop-path, which act on the update, not in the backbone;
another method changes its own by a setting after the colon.

**Time.** Each method has a model of its own with the same random weights, AdamW over what it trains, and the same
random images. A round runs one step of each method, forward, backward and optimizer timed apart; warm-up rounds are not
counted. Ratios are those of the medians, to the first variant of `full` and of `lora`.

**Memory.** Every live storage is counted in a steady step apart from the timed ones: the optimizer's state exists, and
no gradient does when it begins. `kept` is what the forward leaves for backward, the loss included, and `saved` counts
the same from the other side: the tensors that autograd saves, those of the model and the images left out and each
storage once; what a checkpoint holds on to is missing there. Peaks include weights, optimizer state and images. Beside
it stands the resident peak of one process for each method, `rss`, with that before the model was made in `rss_before`;
each of these processes imports the same packages.

Writes `benchmarks/results/step-BACKBONE-BATCH-PRECISION.json`, or --output.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import (
    RESULTS,
    ROOT,
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
from benchmarks.methods import DTYPES, PRECISIONS, Backbone, Settings, Subject, Variant, build, parse_variants
from snell_lightning.adapters import UserError

PHASES = ("forward", "backward", "optimizer")
REFERENCES = ("full", "lora")
# Steps of a process whose resident peak is taken: the first makes the optimizer's state, the others are steady.
_RSS_STEPS = 3


def timed_step(subject: Subject) -> tuple[float, float, float]:
    """Seconds of forward, backward and optimizer; freeing the gradients counts with the optimizer."""
    device = subject.images.device
    marks = [_now(device)]
    loss = subject.forward()
    marks.append(_now(device))
    loss.backward()
    marks.append(_now(device))
    subject.optimizer.step()
    subject.optimizer.zero_grad(set_to_none=True)
    marks.append(_now(device))
    first, second, third, fourth = marks
    return second - first, third - second, fourth - third


def counted_step(subject: Subject) -> dict[str, int]:
    """Bytes of one steady step, by what they are for; the subject has made a step before."""
    from snell_lightning.memory import StorageTracker

    subject.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    state = [value for held in subject.optimizer.state.values() for value in held.values() if torch.is_tensor(value)]
    tensors = [*subject.model.parameters(), *subject.model.buffers()]
    with StorageTracker(subject.model, subject.images, subject.labels, *state) as tracker:
        before = tracker.live
        with tracker.phase("forward"):
            loss = subject.forward()
        with tracker.phase("backward"):
            loss.backward()
        gradients = storage_bytes(parameter.grad for parameter in subject.model.parameters())
        with tracker.phase("optimizer"):
            subject.optimizer.step()
        del loss
    subject.optimizer.zero_grad(set_to_none=True)
    peaks = {f"peak_{name}": tracker.phases[name].peak for name in PHASES}
    return {
        "weights": storage_bytes(tensors),
        "gradients": gradients,
        "optimizer": storage_bytes(state),
        "kept": tracker.phases["forward"].live_after - before,
        "saved": saved_bytes(subject),
        **peaks,
        "peak": max(peaks.values()),
    }


def saved_bytes(subject: Subject) -> int:
    """Bytes of the tensors that autograd saves in a forward, the model's and the images left out, each storage once."""
    given = [*subject.model.parameters(), *subject.model.buffers(), subject.images, subject.labels]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = subject.forward()
    # What is saved lives as long as the loss does, so no address was counted for two tensors.
    del loss
    return sum(saved.values())


def storage_bytes(tensors: Iterable[Tensor | nn.Parameter | None]) -> int:
    """Bytes of the tensors' storages, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())


def allocator_peak(subject: Subject) -> int | None:
    """What an accelerator's allocator says of one step: its peak above what was allocated before it."""
    device = subject.images.device
    if device.type == "cpu" or not hasattr(torch.accelerator, "reset_peak_memory_stats"):
        return None
    synchronize(device)
    torch.accelerator.reset_peak_memory_stats(device)
    before = torch.accelerator.memory_allocated(device)
    subject.step()
    synchronize(device)
    return torch.accelerator.max_memory_allocated(device) - before


def resident_peak() -> int | None:
    """This process's resident peak in bytes; `None` where the system does not tell.

    Linux's VmHWM comes first: `ru_maxrss` of a fresh process can be its parent's there.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_peak_of(variant: Variant, argv: Sequence[str]) -> dict[str, int | None]:
    """The resident peak of a process that runs nothing but this variant."""
    command = [sys.executable, "-m", "benchmarks.step", *argv, "--rss-of", variant.label]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{variant.label} in a process of its own failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(variants: list[Variant], arguments: argparse.Namespace, device: torch.device) -> dict[str, dict[str, Any]]:
    """Raw times and bytes of the variants, whose models are all held at once."""
    backbone = backbone_of(arguments)
    subjects = {variant.label: build(variant, backbone, arguments.batch, device) for variant in variants}
    results: dict[str, dict[str, Any]] = {
        label: {
            "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
            "trained_parameters": sum(p.numel() for p in subject.model.parameters() if p.requires_grad),
        }
        for label, subject in subjects.items()
    }
    if arguments.time:
        jobs = {label: lambda subject=subject: timed_step(subject) for label, subject in subjects.items()}
        for label, steps in in_turns(jobs, arguments.steps, arguments.warmup).items():
            results[label]["seconds"] = {
                **{phase: list(times) for phase, times in zip(PHASES, zip(*steps, strict=True), strict=True)},
                "step": [sum(step) for step in steps],
            }
    if arguments.memory:
        for label, subject in subjects.items():
            subject.step()
            peak = allocator_peak(subject)
            results[label]["bytes"] = counted_step(subject) | ({} if peak is None else {"allocator_peak": peak})
    return results


def summarize(results: dict[str, dict[str, Any]], variants: list[Variant]) -> None:
    """Add the medians and the ratios to the first `full` and `lora`."""
    for result in results.values():
        if "seconds" in result:
            result["median_seconds"] = {phase: median(times) for phase, times in result["seconds"].items()}
    for reference in REFERENCES:
        label = next((variant.label for variant in variants if variant.method == reference), None)
        if label is None:
            continue
        for result in results.values():
            ratios = result.setdefault("ratios", {}).setdefault(reference, {})
            if "seconds" in result:
                ratios["step"] = ratio(result["median_seconds"]["step"], results[label]["median_seconds"]["step"])
            if "bytes" in result:
                for part in ("kept", "peak"):
                    ratios[part] = ratio(result["bytes"][part], results[label]["bytes"][part])


def print_tables(results: dict[str, dict[str, Any]], title: str) -> None:
    """Times, bytes, and ratios."""
    timed = {label: result for label, result in results.items() if "seconds" in result}
    if timed:
        rows = [
            [label, result["trained_parameters"], *(result["median_seconds"][part] for part in (*PHASES, "step"))]
            for label, result in timed.items()
        ]
        print_table(f"{title}: seconds, medians", ["method", "trained", *PHASES, "step"], rows)
    counted = {label: result["bytes"] for label, result in results.items() if "bytes" in result}
    if counted:
        parts = list(next(iter(counted.values())))
        names = {"peak_forward": "in forward", "peak_backward": "in backward", "peak_optimizer": "in optimizer"}
        rows = [[label, *(mebibytes(found.get(part)) for part in parts)] for label, found in counted.items()]
        print_table(f"{title}: MiB", ["method", *(names.get(part, part.replace("_", " ")) for part in parts)], rows)
    compared = {label: result["ratios"] for label, result in results.items() if "ratios" in result}
    if compared:
        pairs = [(reference, part) for reference, parts in next(iter(compared.values())).items() for part in parts]
        rows = [[label, *(ratios[name][part] for name, part in pairs)] for label, ratios in compared.items()]
        print_table(f"{title}: ratios", ["method", *(f"{part} / {name}" for name, part in pairs)], rows)


def backbone_of(arguments: argparse.Namespace) -> Backbone:
    """The backbone that the arguments describe."""
    return Backbone(arguments.backbone, arguments.classes, arguments.image_size, arguments.blocks, arguments.seed)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[Variant]]:
    """The arguments and the variants they name."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="vit_base_patch16_224", help="timm name; its weights are random")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--methods", default="full,linear,lora,snell,straightforward", help="see above")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--recompute", choices=("none", "inputs", "blocks"), default="inputs", help="of snell")
    parser.add_argument("--backbone-dtype", choices=tuple(DTYPES), default="float32", help="of snell's frozen weights")
    parser.add_argument("--dropout", type=float, default=0.0, help="of snell's update's input")
    parser.add_argument("--drop-path", type=float, default=0.0, help="of snell's update, per sample")
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=10, help="rounds that are counted")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--threads", type=int, help="of the CPU; by default torch's own choice")
    parser.add_argument("--device", help="by default the accelerator, if there is one")
    parser.add_argument("--image-size", type=int, help="pixels; by default the model's own")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--blocks", type=int, help="keep only the first so many blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--one-at-a-time", action="store_true", help="hold one model at once: not in turns, less memory"
    )
    parser.add_argument("--no-time", dest="time", action="store_false")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="neither storages nor resident peak")
    parser.add_argument("--no-rss", dest="rss", action="store_false", help="no resident peak")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--rss-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name in ("batch", "steps", "classes"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    general = Settings(
        arguments.precision, arguments.rank, arguments.sparsity, arguments.recompute, arguments.backbone_dtype,
        arguments.dropout, arguments.drop_path, arguments.lora_dropout,
    )  # fmt: skip
    try:
        return arguments, parse_variants(arguments.rss_of or arguments.methods, general)
    except UserError as error:
        parser.error(str(error))


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write and return the result."""
    arguments, variants = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    if arguments.rss_of:
        return _rss_of(variants[0], arguments, device)

    rss = {}
    if arguments.memory and arguments.rss and device.type == "cpu":
        given = list(sys.argv[1:] if argv is None else argv)
        rss = {variant.label: resident_peak_of(variant, given) for variant in variants}
    results: dict[str, dict[str, Any]] = {}
    for together in [[variant] for variant in variants] if arguments.one_at_a_time else [variants]:
        results |= measure(together, arguments, device)
        gc.collect()
    for variant in variants:
        results[variant.label] = {"settings": variant.read_settings(), **results[variant.label]}
        results[variant.label].get("bytes", {}).update(rss.get(variant.label, {}))
    summarize(results, variants)

    title = f"{arguments.backbone}, batch {arguments.batch}, {arguments.precision}"
    result = {
        "what": f"one training step: {title}",
        "environment": environment(device),
        "arguments": {name: value for name, value in vars(arguments).items() if name not in ("output", "rss_of")},
        "in_turns": not arguments.one_at_a_time,
        "methods": results,
    }
    name = f"step-{arguments.backbone}-{arguments.batch}-{arguments.precision}.json".replace("/", "-")
    write_result(arguments.output or RESULTS / name, result)
    print_tables(results, title)
    return result


def _rss_of(variant: Variant, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    if importlib.util.find_spec("peft"):
        importlib.import_module("peft")
    before = resident_peak()
    subject = build(variant, backbone_of(arguments), arguments.batch, device)
    for _ in range(_RSS_STEPS):
        subject.step()
    result = {"rss": resident_peak(), "rss_before": before}
    print(json.dumps(result))
    return result


def _now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    try:
        run()
    except UserError as error:
        sys.exit(f"error: {error}")
