"""The published runs as configs: each says what its row of `recipes.csv` says, and runs on a tree like its own."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import recipes
from snell_lightning import cli
from snell_lightning.lightning_cli import SnellCLI

ROWS = recipes.rows()
NAMES = [recipes.config_name(row) for row in ROWS]


class ParsedError(Exception):
    """Raised in place of making model and data."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    parsed = {}

    def stop(self: SnellCLI) -> None:
        parsed["config"] = self.config["fit"]
        raise ParsedError

    monkeypatch.setattr(SnellCLI, "before_instantiate_classes", stop)

    def run(*arguments: str) -> Any:
        with pytest.raises(ParsedError):
            cli.make_cli(arguments)
        return parsed["config"]

    return run


def test_every_published_run_has_a_config_and_no_config_is_of_none() -> None:
    assert len(ROWS) == len(set(NAMES)) == 48
    shipped = {path.relative_to(cli.SHIPPED_CONFIGS).as_posix() for path in recipes.CONFIGS.rglob("*/*.yaml")}
    assert shipped == set(NAMES)


@pytest.mark.parametrize(("row", "name"), zip(ROWS, NAMES, strict=True), ids=NAMES)
def test_a_config_says_what_its_row_says(row: dict[str, str], name: str, parse: Callable[..., Any]) -> None:
    command = re.search(r"^# +python -m snell_lightning (fit .*)$", recipes.written(row), flags=re.MULTILINE)
    assert command is not None
    assert f"--config {name} " in command[1]
    config = parse(*shlex.split(command[1]))
    model, data, trainer = config.model, config.data, config.trainer
    adapter, optimizer = model.adapter, model.optimizer
    epochs = trainer.max_epochs
    cropped = data.augmentation == "crop"
    callbacks = {each.class_path.rpartition(".")[2]: each.init_args for each in trainer.callbacks or []}
    budget, average = callbacks.get("LayerBudget"), callbacks.get("AdapterEMA")
    method = "snell" if adapter.kernel == "distance" else "mixk" if budget is None else "snella"
    # Every field of the table, as text; what a row leaves empty is not of its method.
    said = {
        "benchmark": data.source,
        "group": f"{'snell' if method == 'snell' else 'snella'}{adapter.rank}",
        "method": method,
        "dataset": Path(name).stem,
        "rank": adapter.rank,
        "sparsity": adapter.sparsity,
        "epochs": epochs,
        "batch_size": data.batch_size * trainer.accumulate_grad_batches,
        "lr": optimizer.init_args.lr,
        "weight_decay": optimizer.init_args.weight_decay,
        "amp": trainer.precision not in (None, "32-true"),
        "no_aug": data.augmentation == "none",
        "direct_resize": not cropped,
        "inception_norm": data.normalization != "imagenet",
        "budget_allocation": budget is not None,
        "no_drop_out": adapter.dropout != 0.1,
        "no_drop_path": adapter.drop_path != 0.1,
        "drop_path": model.backbone_args["drop_path_rate"],
        "script": f"train{'_alloc' if budget or average else ''}{'_ema' if average else ''}.py",
    }
    if budget is not None:
        said |= {
            "target_sparsity": budget.target_sparsity,
            "init_warmup": budget.warmup_epochs,
            "final_warmup": budget.final_epochs,
            "mask_interval": budget.interval,
            "beta1": budget.beta1,
            "beta2": budget.beta2,
        }
    else:
        # One row has a budget's settings without a budget.
        row = {name: "" if name in _OF_A_BUDGET else value for name, value in row.items()}
    if average is not None:
        said["ema_decay"] = average.decay
    for field, value in row.items():
        if field == "sparsity" and method == "mixk":
            assert (value or "0", adapter.sparsity, adapter.sparsifier) == ("0", 0.0, "none")
        elif field == "importance":
            # What a budget follows from, named or not.
            assert value in ("", "ipt")
        elif field in said:
            expected = float(value) if isinstance(said[field], float) else type(said[field])(_as_python(value))
            assert said[field] == expected, field
        else:
            assert value == "", field

    # What the table does not have, since it is the same in all of them (METHOD of the released code).
    assert model.backbone == "vit_base_patch16_224.augreg_in21k"
    assert model.pretrained
    assert optimizer.class_path == "torch.optim.AdamW"
    assert (adapter.pieces, adapter.scale, adapter.start) == (2, 0.1, "random")
    assert adapter.sparsifier == ("none" if method == "mixk" else "magnitude")
    assert adapter.dropout_pattern == {r"attn\.proj$": 0.0}
    assert (model.warmup * epochs, model.warmup_lr, model.min_lr) == (10, 1e-6, 1e-5)
    assert trainer.gradient_clip_val is None
    assert data.crop_pct == (224 / 256 if cropped else None)
    assert data.protocol == "validation"


_OF_A_BUDGET = {"target_sparsity", "init_warmup", "final_warmup", "mask_interval", "beta1", "beta2", "importance"}


def _as_python(value: str) -> Any:
    return {"True": True, "False": False}.get(value, value)


def test_the_configs_are_what_the_script_writes() -> None:
    for row, name in zip(ROWS, NAMES, strict=True):
        assert (cli.SHIPPED_CONFIGS / name).read_text(encoding="utf-8") == recipes.written(row), name


def images(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (number % 4 * 60, 90, 255 - number % 4 * 60)).save(root / name)


def vtab_tree(root: Path) -> Path:
    for listed, count in (("train800", 8), ("val200", 4), ("test", 4)):
        names = [f"images/{listed}/{number:06}.jpg" for number in range(count)]
        images(root, names)
        lines = [f"{name} {number % 4}" for number, name in enumerate(names)]
        (root / f"{listed}.txt").write_text("\n".join(lines))
    return root


def fgvc_tree(root: Path) -> Path:
    for listed in ("train", "val", "test"):
        names = [f"{label:03}.Bird/{listed}.jpg" for label in range(4)]
        images(root / "images", names)
        (root / f"{listed}.json").write_text(str({name: label for label, name in enumerate(names)}).replace("'", '"'))
    return root


@pytest.mark.parametrize(
    ("name", "tree", "folder"),
    [
        ("paper/vtab/snell32/kitti.yaml", vtab_tree, "kitti"),
        ("paper/fgvc/snella32/cub.yaml", fgvc_tree, "birds"),
    ],
)
def test_a_published_run_runs_on_a_tree_like_its_own_with_two_overrides(
    name: str, tree: Callable[[Path], Path], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root = tree(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    cli.main(["fit", "--config", name, "--data.root", str(root), "--model.backbone", "vit_micro_patch4_32.mnist5k"])
    printed = capsys.readouterr().out
    assert "best val/acc1" in printed
    assert "for 100 steps" in printed
    assert (tmp_path / "runs" / "version_0" / "adapter.safetensors").is_file()
