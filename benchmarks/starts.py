"""Two ways to start at exactly zero, beside the published random start.

    python -m benchmarks.starts

| start        | update                                                                                         |
|--------------|------------------------------------------------------------------------------------------------|
| `equal`      | `S(K(P, Q))`, the pieces of P and Q equal at first, so that their distances cancel (the default) |
| `subtracted` | `S(K(P, Q) - K(P0, Q0))`, with the initial factors kept or drawn again                          |
| `random`     | `S(K(P, Q))`, all pieces drawn                                                                  |

All three with the default sparsifier and scale of `SnellConfig` and the learning rate of `vit.yaml`, rank 8, on
scikit-learn's digits and on silhouettes of animals; three seeds, validation images alone. The subtraction costs a
second kernel for each one that is made. Writes `benchmarks/results/starts.json` and prints a table.
"""

import argparse
import statistics
from dataclasses import replace
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, environment, print_table, write_result
from benchmarks.methods import Backbone, Settings, make_model, parse_variants
from benchmarks.pretrained import folder
from benchmarks.tasks import TASKS, splits
from benchmarks.training import train
from snell_lightning.adapters import SnellDelta, SnellLinear
from snell_lightning.backbones.embedded import EMBEDDED_BACKBONE

RATE = 3e-3
# Task, and whether the backbone is the one that ships with the package, at 32 pixels.
PLACES = {"digits, width 144": ("digits", True), "animals, width 144": ("animals", True), "digits": ("digits", False)}
STARTS = {"equal": "", "subtracted": ":start=random", "random": ":start=random"}


class Subtracted(SnellDelta):
    """An update whose kernel has the initial factors' kernel taken off.

    As further pieces of the other sign: `[P_0, P0_0, P0_1, P_1]` for two, so that pairs cancel at first, but for what
    the sum's rounding leaves.

    Args:
        delta: Whose factors and settings are taken over.
    """

    def __init__(self, delta: SnellDelta) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.config = delta.in_features, delta.out_features, delta.config
        self.sparsity, self.scale = delta.sparsity, delta.scale
        self.p, self.q = delta.out_factors, delta.in_factors
        self.register_buffer("p0", self.p.detach().clone())
        self.register_buffer("q0", self.q.detach().clone())

    @property
    def out_factors(self) -> Tensor:
        """`(2 pieces, out, columns)`."""
        return _paired(self.p, self.p0)

    @property
    def in_factors(self) -> Tensor:
        """`(2 pieces, in, columns)`."""
        return _paired(self.q, self.q0)

    def adapter_params(self) -> list[str]:
        """Names of the trained factors."""
        return ["p", "q"]


def _paired(factors: Tensor, initial: Any) -> Tensor:
    pairs = [(f, i) if piece % 2 == 0 else (i, f) for piece, (f, i) in enumerate(zip(factors, initial, strict=True))]
    return torch.stack([each for pair in pairs for each in pair])


def subtract(model: nn.Module) -> None:
    """Replace every update of a model that was injected with a random start, in place."""
    for module in model.modules():
        if isinstance(module, SnellLinear):
            module.deltas = nn.ModuleList(Subtracted(delta) for delta in module.updates)


def run(start: str, place: str, seed: int) -> dict[str, float]:
    """Best validation accuracy and lowest loss of one run."""
    task, embedded = PLACES[place]
    name = EMBEDDED_BACKBONE if embedded else f"local-dir:{folder(TASKS[task].backbone)}"
    described = timm.create_model(name, num_classes=0).pretrained_cfg
    chosen = replace(TASKS[task], image_size=32) if embedded else TASKS[task]
    data = splits(chosen, seed, tuple(described["mean"]), tuple(described["std"]))
    (variant,) = parse_variants(f"snell:rank=8{STARTS[start]}", Settings())
    backbone = Backbone(name, 10, chosen.image_size, seed=seed, pretrained=True)
    model = make_model(variant, backbone, torch.device("cpu"))
    if start == "subtracted":
        subtract(model)
    outcome = train(model, data, RATE, chosen.epochs, seed)
    return {"val/acc1": round(max(outcome.accuracy), 4), "val/loss": round(min(outcome.loss), 4)}


def main() -> None:
    """Run everything, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for place in PLACES:
        results[place] = {start: [run(start, place, seed) for seed in range(seeds)] for start in STARTS}
        print(place, results[place], flush=True)
    write_result(
        RESULTS / "starts.json",
        {"what": __doc__.splitlines()[0], "environment": environment(torch.device("cpu")), "runs": results},
    )
    rows = [
        [place, start, *(statistics.mean(run[name] for run in runs) for name in ("val/acc1", "val/loss"))]
        for place, starts in results.items()
        for start, runs in starts.items()
    ]
    print_table("Starts, means over seeds", ["task", "start", "val/acc1", "val/loss"], rows)


if __name__ == "__main__":
    main()
