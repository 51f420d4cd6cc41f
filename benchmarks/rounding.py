"""One bf16 product with `W + dW` rounded at random, beside two products: is what is learned the same?

    pip install -e '.[bench]'
    python -m benchmarks.rounding            both jobs, five seeds; goes on where it was stopped

Jobs are the embedded one, `vit.yaml` under bf16-mixed, and a task of `benchmarks.tasks` on its pretrained backbone with
the loop of `benchmarks.training` under autocast to bf16. Each seed runs with both settings of `rounding`, all else
being equal. The best epoch is taken on validation data, and the test images are looked at once.

Beside it stands what rounding does to a layer's output: the noise of one product with the sum rounded at random, and
the error of one with the sum rounded to the nearest, both relative to the update's own part of the output.

Writes `benchmarks/results/rounding.json`.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import embedded
from benchmarks.common import RESULTS, environment, in_a_process, print_table, write_result
from benchmarks.methods import Backbone, Settings, make_model, parse_variants
from benchmarks.pretrained import folder
from benchmarks.tasks import TASKS, splits
from benchmarks.training import restore, score, train
from snell_lightning.adapters.config import ROUNDING
from snell_lightning.adapters.update.rounding import round_at_random

RESULT = RESULTS / "rounding.json"
RATE = 3e-3


def by_cli(rounding: str, seed: int) -> tuple[float, float]:
    """Validation and test accuracy of the embedded job."""
    (rate,) = embedded.SHIPPED
    options = ["--trainer.precision", "bf16-mixed", "--model.adapter.rounding", rounding]
    with tempfile.TemporaryDirectory() as place:
        cli = embedded.fit(options, rate, seed, Path(place))
        return embedded.selected(cli), embedded.tested(cli)


def by_loop(task_name: str, rounding: str, seed: int) -> tuple[float, float]:
    """Validation and test accuracy of a task."""
    task = TASKS[task_name]
    place = folder(task.backbone)
    described = json.loads((place / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    data = splits(task, seed, tuple(described["mean"]), tuple(described["std"]))
    classes = int(data["train"].labels.max()) + 1
    backbone = Backbone(f"local-dir:{place}", classes, task.image_size, seed=seed, pretrained=True)
    (variant,) = parse_variants(f"snell:rank=8:sparsity=0.9:rounding={rounding}", Settings())
    model = make_model(variant, backbone, torch.device("cpu"))
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    outcome = train(model, data, RATE, task.epochs, seed)
    restore(model, outcome.best)
    return max(outcome.accuracy), score(model, data["test"])[0]


def of_a_layer(size: float) -> dict[str, float]:
    """Errors of a layer's output under each rounding, relative to the update's part, where entries have this size.

    The weight is that of a ViT-B's projection, of standard deviation 0.02; a tenth of the update's entries survives.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight, x = 0.02 * draw(768, 768), draw(256, 768).bfloat16().float()
    update = size * draw(768, 768) * (torch.rand(768, 768, generator=generator) < 0.1)
    exact, part = x @ (weight + update).T, (x @ update.T).norm()
    apart = x @ weight.bfloat16().float().T + x @ update.bfloat16().float().T
    nearest = x @ (weight + update).bfloat16().float().T
    random = torch.stack([x @ round_at_random(weight + update, seed).float().T for seed in range(32)])
    # The update's own part as one product with the nearest has it: the difference that the update makes.
    own = x @ ((weight + update).bfloat16().float() - weight.bfloat16().float()).T
    return {
        "size": size,
        "apart": ((apart - exact).norm() / part).item(),
        "nearest": ((nearest - exact).norm() / part).item(),
        "random": ((random - exact).norm() / 32**0.5 / part).item(),
        "random, mean of 32": ((random.mean(0) - exact).norm() / part).item(),
        "own part, nearest": ((own - x @ update.T).norm() / part).item(),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run what has not run, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rounding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="digits", choices=tuple(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--run", nargs=3, metavar=("JOB", "ROUNDING", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    known: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"runs": {}}
    if arguments.run:
        torch.set_num_threads(1)
        job, rounding, seed = arguments.run
        run = by_cli(rounding, int(seed)) if job == "embedded" else by_loop(job, rounding, int(seed))
        known["runs"][" ".join(arguments.run)] = [round(value, 4) for value in run]
        write_result(arguments.out, known)
        return
    jobs = ("embedded", arguments.task)
    for seed in range(arguments.seeds):
        for job in jobs:
            for rounding in ROUNDING:
                name = f"{job} {rounding} {seed}"
                if name not in known["runs"]:
                    in_a_process("benchmarks.rounding", "--out", str(arguments.out), "--run", job, rounding, str(seed))
                    known = json.loads(arguments.out.read_text())
                    print(
                        f"{name}: validation {known['runs'][name][0]:.4f}, test {known['runs'][name][1]:.4f}",
                        flush=True,
                    )
    rows = []
    for job in jobs:
        for rounding in ROUNDING:
            tests = [known["runs"][f"{job} {rounding} {seed}"][1] for seed in range(arguments.seeds)]
            spread = statistics.stdev(tests) if len(tests) > 1 else 0.0
            rows.append({"job": job, "rounding": rounding, "test": statistics.mean(tests), "deviation": spread})
    print_table(
        f"Test accuracy, {arguments.seeds} seeds",
        ("job", "rounding", "mean", "standard deviation"),
        [(row["job"], row["rounding"], f"{row['test']:.4f}", f"{row['deviation']:.4f}") for row in rows],
    )
    layers = [of_a_layer(size) for size in (1e-5, 1e-4, 1e-3)]
    print_table(
        "Error of a layer's output over the update's part of it",
        tuple(layers[0]),
        [tuple(f"{value:.3g}" for value in layer.values()) for layer in layers],
    )
    write_result(
        arguments.out, {"environment": environment(torch.device("cpu")), **known, "jobs": rows, "layers": layers}
    )


if __name__ == "__main__":
    main()
