"""Which learning rate is best, and does it depend on width, rank, sparsity or run length?

    python -m benchmarks.rates            every curve that is not there yet, then the table and the picture
    python -m benchmarks.rates --table    the table and the picture alone

A curve is five learning rates, each twice the one before, on scikit-learn's digits, of which 300 are trained on and 300
others scored; its value is the best epoch's validation loss, in the mean over three seeds. Curves are taken at two
widths (144: the backbone that ships with the package; 384: DINOv2 ViT-S/14), two ranks, two sparsities and two run
lengths, for the default of `SnellConfig` and for the published setting (scale 0.1, `magnitude`, random start). The test
images are not looked at.

Where a curve is lowest is read from the parabola, in the logarithm of the rate, through its lowest point and that one's
neighbours, since the best of five rates says it to a factor of two only. Three times the rate found so is tried too,
under the default setting. A run has collapsed if its loss is never below 0.95 of what guessing has.

Writes a JSON file a curve and seed to `benchmarks/results/rates/`, then `table.md` and `picture.png` beside them. Each
is a process of its own with a single thread, and --workers of them go at once.
"""

import argparse
import itertools
import json
import math
import statistics
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
from benchmarks.training import Outcome, train
from snell_lightning.backbones.embedded import EMBEDDED_BACKBONE

FOLDER = RESULTS / "rates"
RATES = (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2)
SETTINGS = {"default": "", "published": ":scale=0.1:sparsifier=magnitude:start=random"}
# Backbone and image size by width.
WIDTHS = {144: (EMBEDDED_BACKBONE, 32), 384: ("vit_small_patch14_dinov2", 56)}
RANKS, SPARSITIES, EPOCHS = (8, 32), (0.5, 0.9), (2, 6)
CLASSES = 10
SEEDS = (0, 1, 2)
_COLLAPSED = 0.95 * math.log(CLASSES)


@dataclass(frozen=True)
class Curve:
    """What five runs have in common.

    Attributes:
        setting: One of `SETTINGS`.
        width: One of `WIDTHS`.
        rank: Of the factors.
        sparsity: Fraction of the entries that loses.
        epochs: Passes over the 300 images, of 18 steps each.
        seed: Of images, order and initial values.
    """

    setting: str
    width: int
    rank: int
    sparsity: float
    epochs: int
    seed: int = 0

    @property
    def path(self) -> Path:
        """Where its result goes."""
        return FOLDER / f"{self.setting}-{self.width}-{self.rank}-{self.sparsity}-{self.epochs}-{self.seed}.json"


def curves() -> list[Curve]:
    """All of them: with the first seed first, and of each seed the quick ones."""
    every = itertools.product(SEEDS, SETTINGS, WIDTHS, RANKS, SPARSITIES, EPOCHS)
    return [Curve(*values, seed=seed) for seed, *values in every]


def measure(curve: Curve) -> None:
    """Train once with each rate, and for the default with three times the best; write the losses."""
    name, side = WIDTHS[curve.width]
    if name in BACKBONES:
        name = f"local-dir:{folder(name)}"
    described = timm.create_model(name, num_classes=0).pretrained_cfg
    mean, std = tuple(described["mean"]), tuple(described["std"])
    data = splits(replace(TASKS["digits"], image_size=side), curve.seed, mean, std)
    label = f"snell:rank={curve.rank}:sparsity={curve.sparsity}{SETTINGS[curve.setting]}"
    (variant,) = parse_variants(label, Settings())
    device = torch.device("cpu")

    def run(rate: float) -> Outcome:
        model = make_model(variant, Backbone(name, CLASSES, side, seed=curve.seed, pretrained=True), device)
        return train(model, data, rate, curve.epochs, curve.seed)

    outcomes = [run(rate) for rate in RATES]
    losses = [round(min(outcome.loss), 4) for outcome in outcomes]
    result = {
        **asdict(curve), "label": label, "steps": outcomes[0].steps, "rates": RATES, "val/loss": losses,
        "val/acc1": [max(outcome.accuracy) for outcome in outcomes], "environment": environment(device),
    }  # fmt: skip
    if curve.setting == "default":
        rate = 3 * lowest(RATES, losses)
        result["beyond"] = {"rate": rate, "val/loss": round(min(run(rate).loss), 4)}
    write_result(curve.path, result)


def lowest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at which a curve is lowest: the vertex of a parabola through the lowest point and its neighbours."""
    at = min(range(len(losses)), key=lambda place: losses[place])
    if at in (0, len(losses) - 1):
        return rates[at]
    left, middle, right = losses[at - 1 : at + 2]
    # Points lie one step apart in the logarithm; the vertex is within half a step.
    return rates[at] * (rates[at + 1] / rates[at]) ** (0.5 * (left - right) / (left - 2 * middle + right))


def over_seeds(found: Mapping[Curve, Mapping[str, Any]]) -> dict[Curve, dict[str, Any]]:
    """The curves as means over their seeds, as those of seed 0."""
    groups: dict[Curve, list[Mapping[str, Any]]] = {}
    for curve, result in found.items():
        groups.setdefault(replace(curve, seed=0), []).append(result)
    return {
        curve: {
            "steps": results[0]["steps"],
            "seeds": len(results),
            "val/loss": [statistics.mean(losses) for losses in zip(*(r["val/loss"] for r in results), strict=True)],
            "beyond": [result["beyond"]["val/loss"] for result in results if "beyond" in result],
        }
        for curve, results in groups.items()
    }


def table(found: Mapping[Curve, Mapping[str, Any]]) -> str:
    """Best rates, and what the losses are at and around them.

    Args:
        found: Means over seeds, from `over_seeds`.
    """
    lines = ["Best learning rate by curve (digits, validation loss, mean over seeds), and the loss at each rate.", ""]
    head = ["setting", "width", "rank", "sparsity", "steps", "seeds", "best", *(f"{rate:g}" for rate in RATES)]
    head.append("3 x best")
    lines.append(f"| {' | '.join(head)} |")
    lines.append("|---" * len(head) + "|")
    for curve, result in found.items():
        cells = [_said(loss) for loss in result["val/loss"]]
        cells.append(", ".join(map(_said, result["beyond"])))
        best = lowest(RATES, result["val/loss"])
        edge = " or more" if best == RATES[-1] else " or less" if best == RATES[0] else ""
        about = [curve.setting, curve.width, curve.rank, curve.sparsity, result["steps"], result["seeds"]]
        lines.append("| " + " | ".join(map(str, [*about, f"{best:.1e}{edge}", *cells])) + " |")
    for setting in SETTINGS:
        best = [lowest(RATES, result["val/loss"]) for curve, result in found.items() if curve.setting == setting]
        if best:
            low, high = min(best), max(best)
            middle = math.sqrt(low * high)
            around = f"all within a factor of {math.sqrt(high / low):.1f} of {middle:.1e}"
            edges = sum(rate in (RATES[0], RATES[-1]) for rate in best)
            beyond = f"; {edges} of {len(best)} are at the end of what was tried, and may lie beyond" if edges else ""
            lines += ["", f"{setting}: best rates from {low:.1e} to {high:.1e}, {around}{beyond}."]
    return "\n".join(lines) + "\n"


def _said(loss: float) -> str:
    return f"{loss:.3f}" + (" collapsed" if loss >= _COLLAPSED else "")


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
    means = over_seeds(found)
    text = table(means)
    print(text)
    (FOLDER / "table.md").write_text(text, encoding="utf-8")
    picture(means, FOLDER / "picture.png")


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
