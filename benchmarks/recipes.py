"""Write the published runs as configs, `configs/paper/BENCHMARK/GROUP/DATASET.yaml`, from `recipes.csv`.

    python -m benchmarks.recipes

`recipes.csv` has the hyperparameters of each of the 48 runs that were published with SNELL (arXiv 2411.01800) and
SNELLA (arXiv 2510.24037). `tests/test_recipes.py` compares every config with its row.
"""

import csv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "benchmarks" / "recipes.csv"
CONFIGS = ROOT / "configs" / "paper"
# Folders of the sets as people have them.
FOLDERS = {
    "cub": "CUB_200_2011",
    "nabirds": "nabirds",
    "oxfordflower": "OxfordFlower",
    "stanforddog": "StanfordDogs",
    "stanfordcar": "StanfordCars",
}
TITLES = {"vtab": "VTAB-1k", "fgvc": "FGVC"}
# Epochs in which the learning rate rises.
WARMUP = 10

_CONFIG = """\
# {title}, {benchmark}: {dataset}, with the published hyperparameters (arXiv {paper}).
#
#     python -m snell_lightning fit --config {name} --data.root {root}
#
# As in the paper, --data.protocol published trains on the validation images too and counts the best test score.

seed_everything: 0
model:
  backbone: vit_base_patch16_224.augreg_in21k
  backbone_args:
    drop_path_rate: {drop_path}
  adapter:
    rank: {rank}
    sparsity: {sparsity}
    kernel: {kernel}
    sparsifier: {sparsifier}
    pieces: 2
    scale: 0.1
    start: random
    dropout: 0.1
    drop_path: 0.1
    # No dropout on the input of the attention's output projection.
    dropout_pattern:
      'attn\\.proj$': 0.0
  optimizer:
    class_path: torch.optim.AdamW
    init_args:
      lr: {lr}
      weight_decay: {weight_decay}
  # {warmup_epochs} of {epochs} epochs.
  warmup: {warmup}
  warmup_lr: 1.0e-6
  min_lr: 1.0e-5
data:
  source: {benchmark_key}
  normalization: imagenet
{images}  batch_size: {batch_size}
trainer:
  max_epochs: {epochs}
{more}"""
_WHOLE = "  # The whole image, resized; no augmentation.\n  augmentation: none\n"
_BUDGET = """\
    # Layers compete, and the entries that survive get fewer, once an epoch.
    - class_path: snell_lightning.callbacks.LayerBudget
      init_args:
        target_sparsity: {target_sparsity}
        warmup_epochs: {init_warmup}
        final_epochs: {final_warmup}
        interval: {mask_interval}
        beta1: {beta1}
        beta2: {beta2}
"""
_AVERAGE = """\
    # What is scored and saved are averages over steps.
    - class_path: snell_lightning.callbacks.AdapterEMA
      init_args:
        decay: {ema_decay}
"""
_CROPPED = "  # Evaluated on the middle 224 of 256 pixels.\n  augmentation: crop\n  crop_pct: 0.875\n"


def rows() -> list[dict[str, str]]:
    """The published runs."""
    with RECIPES.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def config_name(row: dict[str, str]) -> str:
    """Where a run's config is among the shipped ones."""
    return f"paper/{row['benchmark']}/{row['group']}/{row['dataset']}.yaml"


def written(row: dict[str, str]) -> str:
    """A run's config."""
    benchmark, method, epochs = row["benchmark"], row["method"], int(row["epochs"])
    folder = f"vtab-1k/{row['dataset']}" if benchmark == "vtab" else FOLDERS[row["dataset"]]
    return _CONFIG.format(
        title=f"{'SNELL' if method == 'snell' else 'SNELLA'}-{row['rank']}",
        paper="2411.01800" if method == "snell" else "2510.24037",
        kernel="distance" if method == "snell" else "mixture",
        # The mixture without a budget is dense.
        sparsifier="none" if method == "mixk" else "magnitude",
        more=_more(row),
        benchmark=TITLES[benchmark],
        benchmark_key=benchmark,
        dataset=row["dataset"],
        name=config_name(row),
        root=folder,
        drop_path=row["drop_path"],
        rank=row["rank"],
        sparsity=float(row["sparsity"] or 0),
        lr=float(row["lr"]),
        weight_decay=float(row["weight_decay"]),
        warmup_epochs=WARMUP,
        warmup=WARMUP / epochs,
        images=_WHOLE if row["direct_resize"] == row["no_aug"] == "True" else _CROPPED,
        batch_size=row["batch_size"],
        epochs=epochs,
    )


def _more(row: dict[str, str]) -> str:
    """Precision and callbacks, where a run has them."""
    precision = "  precision: 16-mixed\n" if row["amp"] == "True" else ""
    callbacks = _BUDGET.format(**row) if row["budget_allocation"] == "True" else ""
    callbacks += _AVERAGE.format(**row) if row["ema_decay"] else ""
    return precision + (f"  callbacks:\n{callbacks}" if callbacks else "")


def main() -> None:
    """Write them."""
    for row in rows():
        path = CONFIGS.parent / config_name(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(written(row), encoding="utf-8")


if __name__ == "__main__":
    main()
