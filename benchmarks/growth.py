"""How a step's time and peak bytes grow with width, rank, tokens, batch and sparsity, and one very large layer.

    pip install -e '.[bench]'
    python -m benchmarks.growth

A step is forward and backward in training. Width, rank, tokens and sparsity are those of one square `SnellLinear`, one
of them varied at a time; the batch is that of a whole small ViT. Sparsity is plotted as the fraction of the entries
that survive. Bytes are every live storage at the peak, above the tensors of the layer (or the model) and what it is
given. The points of one sweep are measured in turns. Exponents are least squares in logarithms over all points of a
sweep: where a constant cost stands beside the growing one, they are below those of the growing part.

Besides, one layer of 4096 inputs and 11008 outputs (more than 2^24 entries) is trained for a few steps towards random
outputs.

Writes `growth.json`, `growth-time.svg` and `growth-bytes.svg` to `benchmarks/results`, or to --output.
"""

import argparse
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import (
    RESULTS,
    environment,
    in_turns,
    mebibytes,
    median,
    pick_device,
    print_table,
    seconds,
    write_result,
)
from benchmarks.methods import Backbone
from snell_lightning.adapters import SnellConfig, SnellLinear, UserError, inject

_COLOUR = "#1f5fa8"


@dataclass(frozen=True)
class Layer:
    """One square layer and its input.

    Args:
        width: Inputs and outputs.
        rank: Columns of the factors.
        tokens: Rows of the input.
        sparsity: Fraction of the update's entries that loses.
    """

    width: int = 768
    rank: int = 32
    tokens: int = 1576
    sparsity: float = 0.9


@dataclass(frozen=True)
class Step:
    """Forward and backward of a module in training mode.

    Attributes:
        run: Makes the step and leaves no gradient behind.
        known: What lives before it: the module and what it is given.
    """

    run: Callable[[], None]
    known: tuple[Tensor | nn.Module, ...]


def layer_step(layer: Layer, device: torch.device) -> Step:
    """A layer's step; the input's gradient is computed as well, as inside a network."""
    torch.manual_seed(0)
    config = SnellConfig(rank=layer.rank, sparsity=layer.sparsity)
    module = SnellLinear(nn.Linear(layer.width, layer.width, device=device), config).train()
    x = torch.randn(layer.tokens, layer.width, device=device, requires_grad=True)
    grad_y = torch.randn_like(x, requires_grad=False)

    def run() -> None:
        module(x).backward(grad_y)
        module.zero_grad(set_to_none=True)
        x.grad = None

    return Step(run, (module, x, grad_y))


def model_step(model: nn.Module, backbone: Backbone, batch: int, device: torch.device) -> Step:
    """An adapted model's step."""
    images, labels = backbone.images(batch, device)

    def run() -> None:
        F.cross_entropy(model(images), labels).backward()
        model.zero_grad(set_to_none=True)

    return Step(run, (model, images, labels))


def peak_bytes(run: Callable[[], None], *known: Tensor | nn.Module) -> int:
    """Most bytes alive during a step, above those of the known tensors and modules."""
    from snell_lightning.memory import StorageTracker

    with StorageTracker(*known) as tracker:
        before = tracker.live
        with tracker.phase("step"):
            run()
    return tracker.phases["step"].peak - before


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The exponent and the factor of `y = factor * x^exponent`, by least squares in logarithms."""
    exponent, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return float(exponent), float(math.exp(intercept))


def sweep(steps: dict[float, Step], rounds: int, warmup: int, device: torch.device) -> dict[str, Any]:
    """Times and peak bytes at each point of one sweep, and the exponents of both."""
    jobs = {str(x): lambda step=step: seconds(step.run, device) for x, step in steps.items()}
    times = in_turns(jobs, rounds, warmup)
    points = list(steps)
    result: dict[str, Any] = {
        "points": points,
        "seconds": times,
        "median_seconds": [median(times[str(x)]) for x in points],
        "peak_bytes": [peak_bytes(step.run, *step.known) for step in steps.values()],
    }
    if len(points) > 1:
        for name, values in (("time", result["median_seconds"]), ("bytes", result["peak_bytes"])):
            exponent, factor = power_law(points, values)
            result[f"{name}_exponent"], result[f"{name}_factor"] = round(exponent, 4) + 0.0, float(f"{factor:.6g}")
    return result


def measure_sweeps(arguments: argparse.Namespace, device: torch.device) -> dict[str, dict[str, Any]]:
    """Every sweep by the quantity that it varies."""
    base = Layer(arguments.base_width, arguments.base_rank, arguments.base_tokens, arguments.base_sparsity)
    layers: dict[str, dict[float, Layer]] = {
        "width": {width: replace(base, width=width) for width in arguments.widths},
        "rank": {rank: replace(base, rank=rank) for rank in arguments.ranks},
        "tokens": {tokens: replace(base, tokens=tokens) for tokens in arguments.tokens},
        "surviving fraction": {
            round(1 - sparsity, 6): replace(base, sparsity=sparsity) for sparsity in arguments.sparsities
        },
    }
    results = {}
    for name, points in layers.items():
        steps = {x: layer_step(layer, device) for x, layer in points.items()}
        results[name] = sweep(steps, arguments.rounds, arguments.warmup, device)
    backbone = Backbone(arguments.backbone, image_size=arguments.image_size)
    model = backbone.create(device)
    inject(model, SnellConfig(rank=arguments.base_rank, sparsity=arguments.base_sparsity))
    steps = {batch: model_step(model, backbone, batch, device) for batch in arguments.batches}
    results["batch"] = sweep(steps, arguments.rounds, arguments.warmup, device)
    return results


def train_large(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train one layer towards random outputs, by AdamW on one batch; at no update the loss would be about 1."""
    in_features, out_features = arguments.large
    torch.manual_seed(0)
    config = SnellConfig(rank=arguments.base_rank, sparsity=arguments.base_sparsity, scale=1.0)
    layer = SnellLinear(nn.Linear(in_features, out_features, device=device), config).train()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    x = torch.randn(arguments.large_tokens, in_features, device=device)
    wanted = torch.randn(arguments.large_tokens, out_features, device=device)
    with torch.no_grad():
        target = F.linear(x, layer.weight, layer.bias) + wanted
    losses: list[float] = []

    def run() -> None:
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))

    times = [seconds(run, device) for _ in range(arguments.large_steps)]
    state = [value for held in optimizer.state.values() for value in held.values() if torch.is_tensor(value)]
    peak = peak_bytes(run, layer, x, wanted, target, *state)
    return {
        "in_features": in_features,
        "out_features": out_features,
        "entries": in_features * out_features,
        "tokens": arguments.large_tokens,
        "rank": arguments.base_rank,
        "sparsity": arguments.base_sparsity,
        "loss": [float(f"{loss:.6g}") for loss in losses[: arguments.large_steps]],
        "seconds": times,
        "median_seconds": median(times),
        "weight_bytes": in_features * out_features * 4,
        "peak_bytes": peak,
    }


def draw(path: Path, what: str, sweeps: dict[str, dict[str, Any]], note: str) -> None:
    """One figure of small logarithmic panels; the same numbers give the same file.

    Args:
        path: SVG file.
        what: `time` or `bytes`.
        sweeps: As `measure_sweeps` makes them.
        note: Text of the last panel.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install -e '.[bench]'") from error
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    key, unit, label = {
        "time": ("median_seconds", 1e-3, "milliseconds a step"),
        "bytes": ("peak_bytes", 2**20, "peak, MiB"),
    }[what]
    style: Any = {"svg.hashsalt": "snell_lightning", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(10, 6), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        panels = figure.subplots(2, 3).flat
        for axes, (name, result) in zip(panels, sweeps.items(), strict=False):
            _draw_panel(axes, name, result["points"], [value / unit for value in result[key]], label)
        for axes in list(figure.axes)[len(sweeps) :]:
            axes.axis("off")
        figure.axes[-1].text(0, 1, note, va="top", wrap=True)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    lines = [line.rstrip() for line in drawn.getvalue().splitlines()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _draw_panel(axes: Any, name: str, x: list[float], y: list[float], label: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=name, ylabel=label)
    axes.plot(x, y, "o", color=_COLOUR, markersize=5)
    if len(x) > 1:
        exponent, factor = power_law(x, y)
        ends = [min(x), max(x)]
        line = [factor * end**exponent for end in ends]
        axes.plot(ends, line, "--", color=_COLOUR, linewidth=1, label=f"exponent {round(exponent, 2) + 0:.2f}")
        axes.legend(frameon=False, loc="upper left")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.minorticks_off()
    low, high = min(y), max(y)
    # A flat sweep stays flat to the eye, and the legend has room.
    axes.set_ylim(low / 1.6, max(high * 2.5, low * 4))
    ticks = [base * 10.0**power for power in range(-4, 9) for base in (1, 2, 5)]
    shown = [tick for tick in ticks if low / 1.6 <= tick <= max(high * 2.5, low * 4)]
    shown = shown[:: max(1, len(shown) // 6)]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.grid(alpha=0.3, linewidth=0.5)


def describe(arguments: argparse.Namespace, large: dict[str, Any] | None, device: torch.device) -> str:
    """What the last panel of both figures says."""
    threads = torch.get_num_threads()
    lines = [
        "Forward and backward, fp32, "
        + (f"{threads} CPU thread{'s' * (threads > 1)}." if device.type == "cpu" else f"on {device.type}."),
        f"One layer, {arguments.base_width} x {arguments.base_width}, rank {arguments.base_rank},",
        f"{arguments.base_tokens} tokens, sparsity {arguments.base_sparsity:g}, but for what varies.",
        f"Batch: the whole {arguments.backbone}.",
        "Bytes: above layer (or model) and input.",
        "Dashed: least squares in logarithms.",
    ]
    if large:
        lines += [
            "",
            f"One layer of {large['in_features']} x {large['out_features']}, {large['tokens']} tokens:",
            f"{large['median_seconds']:.2f} s a step with AdamW,",
            f"peak {mebibytes(large['peak_bytes'])} MiB above a weight of {mebibytes(large['weight_bytes'])} MiB,",
            f"loss {large['loss'][0]:.3f} to {large['loss'][-1]:.3f} in {len(large['loss'])} steps.",
        ]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--tokens", type=int, nargs="+", default=[197, 394, 788, 1576, 3152])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.95, 0.99])
    parser.add_argument("--base-width", type=int, default=768)
    parser.add_argument("--base-rank", type=int, default=32)
    parser.add_argument("--base-tokens", type=int, default=1576)
    parser.add_argument("--base-sparsity", type=float, default=0.9)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224", help="timm name, for the batch")
    parser.add_argument("--image-size", type=int, help="pixels; by default the model's own")
    parser.add_argument(
        "--large", type=int, nargs="*", default=[4096, 11008], help="inputs and outputs; nothing for no large layer"
    )
    parser.add_argument("--large-tokens", type=int, default=64)
    parser.add_argument("--large-steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", help="by default the accelerator, if there is one")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder")
    arguments = parser.parse_args(argv)
    if len(arguments.large) not in (0, 2):
        parser.error("--large takes inputs and outputs, or nothing")
    return arguments


def run(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write, draw and return the result."""
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    sweeps = measure_sweeps(arguments, device)
    large = train_large(arguments, device) if arguments.large else None
    result: dict[str, Any] = {
        "what": "growth of one step's time and peak bytes, forward and backward",
        "environment": environment(device),
        "arguments": {name: value for name, value in vars(arguments).items() if name != "output"},
        "sweeps": sweeps,
        "large": large,
    }
    write_result(arguments.output / "growth.json", result)
    rows = [
        [name, f"{min(found['points']):g} to {max(found['points']):g}", found.get("time_exponent"),
         found.get("bytes_exponent"), found["median_seconds"][-1], mebibytes(found["peak_bytes"][-1])]
        for name, found in sweeps.items()
    ]  # fmt: skip
    columns = ["varied", "range", "time exponent", "bytes exponent", "seconds at the last", "peak MiB at the last"]
    print_table(result["what"], columns, rows)
    note = describe(arguments, large, device)
    if large:
        print("\n".join(note.splitlines()[-4:]))
    for what in ("time", "bytes"):
        draw(arguments.output / f"growth-{what}.svg", what, sweeps, note)
    return result


if __name__ == "__main__":
    run()
