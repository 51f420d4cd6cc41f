"""The embedded job, tuned with SNELL, beside a linear probe and beside the same job from random weights.

    python -m benchmarks.embedded

All three take `configs/vit.yaml` as it stands, so data, steps, batch size and schedule are the same. The learning rate
of each is chosen among the same three on the validation accuracy of one seed; then three seeds run, the best epoch is
taken on validation data, and the test images are looked at once. Writes `benchmarks/results/embedded.json` and prints a table.
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

from snell_lightning.cli import make_cli

RESULT = Path(__file__).parent / "results" / "embedded.json"
METHODS = {
    "snell": [],
    "linear probe": ["--model.adapter", "null"],
    "snell, random weights": ["--model.pretrained", "false"],
}
RATES = (1e-3, 3e-3, 1e-2)


def run(options: list[str], rate: float, seed: int, test: bool) -> dict[str, float]:
    """One fit; validation accuracy of its best epoch, and test accuracy if asked for."""
    with tempfile.TemporaryDirectory() as folder:
        cli = make_cli(
            [
                "--config", "vit.yaml", "--seed_everything", str(seed), "--model.optimizer.lr", str(rate),
                "--trainer.logger.save_dir", folder, "--trainer.enable_progress_bar", "false",
                "--trainer.enable_model_summary", "false", *options,
            ],
            run=False,
        )  # fmt: skip
        cli.trainer.fit(cli.model, cli.datamodule)
        result = {
            "val/acc1": float(cli.trainer.checkpoint_callback.best_model_score),
            "trained_parameters": sum(p.numel() for p in cli.model.parameters() if p.requires_grad),
        }
        if test:
            (scores,) = cli.trainer.test(cli.model, cli.datamodule, ckpt_path="best", verbose=False)
            result["test/acc1"] = scores["test/acc1"]
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds

    table = {}
    for method, options in METHODS.items():
        tried = {rate: run(options, rate, seed=0, test=False)["val/acc1"] for rate in RATES}
        best = max(tried, key=lambda rate: tried[rate])
        runs = [run(options, best, seed, test=True) for seed in range(seeds)]
        scores = [each["test/acc1"] for each in runs]
        table[method] = {
            "lr": best,
            "val/acc1 by lr": {f"{rate:g}": round(score, 4) for rate, score in tried.items()},
            "test/acc1": [round(score, 4) for score in scores],
            "mean": round(statistics.mean(scores), 4),
            "trained_parameters": runs[0]["trained_parameters"],
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
