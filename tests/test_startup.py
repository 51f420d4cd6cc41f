"""A help text and a config that is refused do not wait for packages that only a run needs."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from timm.data import constants
from torchvision.datasets.folder import IMG_EXTENSIONS

from snell_lightning.data.images import readable_endings
from snell_lightning.data.transforms import Normalization

HEAVY = (
    *("torchvision", "timm.models", "timm.data", "huggingface_hub", "tensorboard", "torch.utils.tensorboard"),
    *("sklearn", "scipy", "pandas", "matplotlib", "transformers", "peft", "mlxtend"),
)
FIT = ("fit", "--config", "vit.yaml")


def imported_by(
    *commands: Sequence[str], folder: Path, before: str = "", watched: Sequence[str] = HEAVY
) -> list[tuple[str, list[str]]]:
    """Run commands one after the other in a new process, which first imports `before`.

    Returns:
        For each command what it said, and which of the watched packages were imported by then, since `before`.
    """
    code = f"""
import contextlib, io, json, sys
{before}
known, results = set(sys.modules), []
from snell_lightning.cli import main
for arguments in {commands}:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        main(arguments)
    results.append((said.getvalue(), [name for name in {watched} if name in set(sys.modules) - known]))
print(json.dumps(results))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    return [(said, names) for said, names in json.loads(done.stdout.splitlines()[-1])]


def test_help_and_refusals_import_nothing_heavy_beyond_what_lightning_does(tmp_path: Path) -> None:
    expected = {
        ("--help-all",): "Available subcommands",
        ("fit", "--help-all"): "--model.backbone",
        (*FIT, "--data.bach_size", "3"): "did you mean 'data.batch_size'?",
        (*FIT, "--data.batch_size", "many"): "data.batch_size: expected int, not many",
        (*FIT, "--data.source", "digts"): "expected one of digits, folder",
        (*FIT, "--model.adapter.sparsity", "1.0"): "sparsity must be at least 0",
        (*FIT, "--model.warmup", "1"): "warmup must be at least 0",
    }

    # Lightning imports torchmetrics, which imports what it finds of torchvision, scipy, matplotlib and transformers.
    results = imported_by(*expected, folder=tmp_path, before="import lightning.pytorch.cli")

    for (arguments, part), (said, imported) in zip(expected.items(), results, strict=True):
        assert part in said, arguments
        assert imported == [], arguments


def test_b6_help_imports_nothing(tmp_path: Path) -> None:
    for arguments in (["--help"], ["fit", "--help"], ["test", "-h", "--config", "vit.yaml"]):
        command = [sys.executable, "-X", "importtime", "-m", "snell_lightning", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout.startswith("Fine-tune a pretrained vision backbone")
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert {"snell_lightning.help"} <= imported
        assert imported.isdisjoint({"torch", "numpy", "yaml", "lightning", "jsonargparse", "PIL"})


def test_a_file_that_cannot_be_read_is_told_of_before_lightning_is_imported(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: [")
    expected = {
        ("fit", "--config", "vti.yaml"): "did you mean vit.yaml?",
        ("fit", "--config", "broken.yaml"): "broken.yaml is not valid YAML in line 1",
        ("fit", "--ckpt_path", "gone.ckpt"): "there is no checkpoint gone.ckpt",
    }

    results = imported_by(*expected, folder=tmp_path, watched=("lightning", "torchmetrics", *HEAVY))

    for (arguments, part), (said, imported) in zip(expected.items(), results, strict=True):
        assert part in said, arguments
        assert imported == [], arguments


def test_what_is_written_down_here_is_what_the_libraries_say() -> None:
    assert set(IMG_EXTENSIONS) <= readable_endings()
    imagenet, inception = (Normalization.resolve(name, {}) for name in ("imagenet", "inception"))
    assert (imagenet.mean, imagenet.std) == (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD)
    assert (inception.mean, inception.std) == (constants.IMAGENET_INCEPTION_MEAN, constants.IMAGENET_INCEPTION_STD)


def test_a_tuned_model_is_used_without_what_a_run_needs() -> None:
    code = """
import sys
from snell_lightning import load_classifier
import snell_lightning.inference.predicting
print([name for name in ("lightning", "torchmetrics", "jsonargparse", "tensorboard", "sklearn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
