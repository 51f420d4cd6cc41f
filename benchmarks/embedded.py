"""The embedded job, tuned with SNELL, beside a linear probe and beside the same run from random weights.

    python -m benchmarks.embedded

All three take `configs/vit.yaml`, so data, steps, batch size and schedule are the same. SNELL runs as the config
stands, from pretrained and from random weights; the linear probe gets the best of four learning rates, chosen on the
validation accuracy of one seed. Each runs with three seeds, the best epoch is taken on validation data, and the test
images are looked at once. Writes `results/embedded.json` and prints a table.
"""

import argparse
import json
import platform
import statistics
import tempfile
from pathlib import Path

import lightning
import timm
import torch
import yaml

from snell_lightning.cli import SHIPPED_CONFIGS, SnellCLI, make_cli

RESULT = Path(__file__).parent / "results" / "embedded.json"
CONFIG = yaml.safe_load((SHIPPED_CONFIGS / "vit.yaml").read_text(encoding="utf-8"))
SHIPPED = (CONFIG["model"]["optimizer"]["init_args"]["lr"],)
METHODS: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "snell": ([], SHIPPED),
    "linear probe": (["--model.adapter", "null"], (1e-3, 3e-3, 1e-2, 3e-2)),
    "snell, random weights": (["--model.pretrained", "false"], SHIPPED),
}


def fit(options: list[str], rate: float, seed: int, folder: Path) -> SnellCLI:
    """One fit, whose files go to `folder`."""
    cli = make_cli(
        [
            "--config", "vit.yaml", "--seed_everything", str(seed), "--model.optimizer.lr", str(rate),
            "--trainer.logger.save_dir", str(folder), "--trainer.enable_progress_bar", "false",
            "--trainer.enable_model_summary", "false", *options,
        ],
        run=False,
    )  # fmt: skip
    cli.trainer.fit(cli.model, cli.datamodule)
    return cli


def selected(cli: SnellCLI) -> float:
    """Validation accuracy of the best epoch."""
    return float(cli.trainer.checkpoint_callback.best_model_score)


def tested(cli: SnellCLI) -> float:
    """Test accuracy of that epoch."""
    (scores,) = cli.trainer.test(cli.model, cli.datamodule, ckpt_path="best", verbose=False)
    return scores["test/acc1"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds

    table = {}
    for method, (options, rates) in METHODS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            tried = {rate: fit(options, rate, 0, folder) for rate in rates}
            best = max(tried, key=lambda rate: selected(tried[rate]))
            runs = [tried[best], *(fit(options, best, seed, folder) for seed in range(1, seeds))]
            scores = [tested(run) for run in runs]
        table[method] = {
            "lr": best,
            "val/acc1 by lr": {f"{rate:g}": round(selected(run), 4) for rate, run in tried.items()},
            "test/acc1": [round(score, 4) for score in scores],
            "mean": round(statistics.mean(scores), 4),
            "trained_parameters": sum(p.numel() for p in runs[0].model.parameters() if p.requires_grad),
        }
        print(method, json.dumps(table[method]), flush=True)

    result = {
        "what": "vit.yaml: a ViT pretrained on MNIST, tuned to scikit-learn's digits; test accuracy by seed",
        "methods": table,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "timm": timm.__version__,
        },
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n| method | learning rate | trained parameters | test accuracy, mean ({seeds} seeds) | range |")
    print("|---|---|---|---|---|")
    for method, row in table.items():
        low, high = min(row["test/acc1"]), max(row["test/acc1"])
        print(
            f"| {method} | {row['lr']:g} | {row['trained_parameters']:,} | {row['mean']:.4f} "
            f"| {low:.4f} to {high:.4f} |"
        )


if __name__ == "__main__":
    main()
