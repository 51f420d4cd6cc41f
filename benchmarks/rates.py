"""Which learning rate is best, and does it depend on width, rank, sparsity or run length?

    python -m benchmarks.rates            every curve that is not there yet, then the table and the picture
    python -m benchmarks.rates --table    the table and the picture alone

A curve is five learning rates, each twice the one before, on scikit-learn's digits, of which 300 are trained on and 300
others scored; the best epoch's validation loss is its value. Curves are taken at two widths (144: the backbone that
ships with the package; 384: DINOv2 ViT-S/14), two ranks, two sparsities and two run lengths, for the default of
`SnellConfig` and for the published setting (scale 0.1, `magnitude`, random start). The test images are not looked at.

Where a curve is lowest is read from the parabola, in the logarithm of the rate, through its lowest point and that one's
neighbours, since the best of five rates says it to a factor of two only. Runs that end above the loss of guessing have
diverged.

Writes a JSON file a curve to `benchmarks/results/rates/`, then `table.md` and `picture.png` beside them. Each curve is
a process of its own with a single thread, and --workers of them go at once.
"""

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.common import RESULTS, environment, in_a_process, write_result
from benchmarks.methods import Backbone, Settings, make_model, parse_variants
from benchmarks.pretrained import BACKBONES, folder
from benchmarks.tasks import TASKS, splits
from benchmarks.training import train
from snell_lightning.backbones.embedded import EMBEDDED_BACKBONE

FOLDER = RESULTS / "rates"
RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)
SETTINGS = {"default": "", "published": ":scale=0.1:sparsifier=magnitude:start=random"}
# Backbone and image size by width.
WIDTHS = {144: (EMBEDDED_BACKBONE, 32), 384: ("vit_small_patch14_dinov2", 56)}
RANKS, SPARSITIES, EPOCHS = (8, 32), (0.5, 0.9), (2, 6)
CLASSES = 10


@dataclass(frozen=True)
class Curve:
    """What five runs have in common.

    Attributes:
        setting: One of `SETTINGS`.
        width: One of `WIDTHS`.
        rank: Of the factors.
        sparsity: Fraction of the entries that loses.
        epochs: Passes over the 300 images, of 18 steps each.
    """

    setting: str
    width: int
    rank: int
    sparsity: float
    epochs: int

    @property
    def path(self) -> Path:
        """Where its result goes."""
        return FOLDER / f"{self.setting}-{self.width}-{self.rank}-{self.sparsity}-{self.epochs}.json"


def curves() -> list[Curve]:
    """All of them, the quick ones first."""
    return [Curve(*values) for values in itertools.product(SETTINGS, WIDTHS, RANKS, SPARSITIES, EPOCHS)]


def measure(curve: Curve) -> None:
    """Train once with each rate, and write the losses."""
    name, side = WIDTHS[curve.width]
    if name in BACKBONES:
        name = f"local-dir:{folder(name)}"
    described = timm.create_model(name, num_classes=0).pretrained_cfg
    mean, std = tuple(described["mean"]), tuple(described["std"])
    data = splits(replace(TASKS["digits"], image_size=side), 0, mean, std)
    label = f"snell:rank={curve.rank}:sparsity={curve.sparsity}{SETTINGS[curve.setting]}"
    (variant,) = parse_variants(label, Settings())
    device = torch.device("cpu")
    losses, accuracies = [], []
    for rate in RATES:
        model = make_model(variant, Backbone(name, CLASSES, side, pretrained=True), device)
        outcome = train(model, data, rate, curve.epochs, seed=0)
        losses.append(round(min(outcome.loss), 4))
        accuracies.append(max(outcome.accuracy))
    write_result(
        curve.path,
        {
            **asdict(curve), "label": label, "steps": outcome.steps, "rates": RATES, "val/loss": losses,
            "val/acc1": accuracies, "environment": environment(device),
        },
    )  # fmt: skip


def lowest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at which a curve is lowest: the vertex of a parabola through the lowest point and its neighbours."""
    at = min(range(len(losses)), key=lambda place: losses[place])
    if at in (0, len(losses) - 1):
        return rates[at]
    left, middle, right = losses[at - 1 : at + 2]
    # Points lie one step apart in the logarithm; the vertex is within half a step.
    return rates[at] * (rates[at + 1] / rates[at]) ** (0.5 * (left - right) / (left - 2 * middle + right))


def table(found: Mapping[Curve, Mapping[str, Any]]) -> str:
    """Best rates, and what the losses are at and around them."""
    lines = ["Best learning rate by curve (digits, validation loss), and the loss at each rate.", ""]
    lines += ["| setting | width | rank | sparsity | steps | best | " + " | ".join(f"{r:g}" for r in RATES) + " |"]
    lines.append("|---" * (6 + len(RATES)) + "|")
    for curve, result in found.items():
        cells = [f"{loss:.3f}" + (" diverged" if loss >= math.log(CLASSES) else "") for loss in result["val/loss"]]
        best = lowest(RATES, result["val/loss"])
        about = [curve.setting, curve.width, curve.rank, curve.sparsity, result["steps"], f"{best:.1e}"]
        lines.append("| " + " | ".join(map(str, [*about, *cells])) + " |")
    for setting in SETTINGS:
        best = [lowest(RATES, result["val/loss"]) for curve, result in found.items() if curve.setting == setting]
        if best:
            low, high = min(best), max(best)
            middle = math.sqrt(low * high)
            around = f"all within a factor of {math.sqrt(high / low):.1f} of {middle:.1e}"
            lines += ["", f"{setting}: best rates from {low:.1e} to {high:.1e}, {around}."]
    return "\n".join(lines) + "\n"


def picture(found: Mapping[Curve, Mapping[str, Any]], path: Path) -> None:
    """The curves, a panel for each setting and width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        len(SETTINGS), len(WIDTHS), figsize=(10, 7), sharex=True, sharey="col", layout="constrained", squeeze=False
    )
    for row, setting in enumerate(SETTINGS):
        for column, width in enumerate(WIDTHS):
            axes = panels[row][column]
            for curve, result in found.items():
                if (curve.setting, curve.width) == (setting, width):
                    label = f"rank {curve.rank}, sparsity {curve.sparsity}, {result['steps']} steps"
                    axes.plot(RATES, result["val/loss"], "o-" if curve.epochs == EPOCHS[-1] else "s--", label=label)
            axes.set(xscale="log", yscale="log", title=f"{setting}, width {width}")
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("learning rate")
    for axes in panels[:, 0]:
        axes.set_ylabel("validation loss")
    panels[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report() -> None:
    """Print the table and write it with the picture."""
    found = {curve: json.loads(curve.path.read_text(encoding="utf-8")) for curve in curves() if curve.path.is_file()}
    text = table(found)
    print(text)
    (FOLDER / "table.md").write_text(text, encoding="utf-8")
    picture(found, FOLDER / "picture.png")


def _in_a_process(curve: Curve) -> None:
    in_a_process("benchmarks.rates", "--curve", json.dumps(asdict(curve)))
    print(curve, json.loads(curve.path.read_text(encoding="utf-8"))["val/loss"], flush=True)


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rates", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="processes at once, each with one thread")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--curve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.curve:
        torch.set_num_threads(1)
        measure(Curve(**json.loads(arguments.curve)))
        return
    if not arguments.table:
        missing = [curve for curve in curves() if not curve.path.is_file()]
        with ThreadPoolExecutor(arguments.workers) as pool:
            list(pool.map(_in_a_process, missing))
    report()


if __name__ == "__main__":
    main()
