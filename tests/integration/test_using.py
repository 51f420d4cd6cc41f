"""What docs/using.md shows, done: from the wheel to predictions, its lines of Python, and early stopping."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from .conftest import QUICK, Command

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
KINDS = {"cat": 3, "dog": 8}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a few images of two kinds in `photos`, and two others in `new_photos`."""
    digits = load_digits()
    (tmp_path / "new_photos").mkdir()
    for kind, digit in KINDS.items():
        folder = tmp_path / "photos" / kind
        folder.mkdir(parents=True)
        *known, last = digits.images[digits.target == digit][:25]
        for number, pixels in enumerate(known):
            Image.fromarray((pixels * (255 / 16)).astype(np.uint8)).resize((40, 40)).save(folder / f"{number}.png")
        new = tmp_path / "new_photos" / {"cat": "a.png", "dog": "b.png"}[kind]
        Image.fromarray((last * (255 / 16)).astype(np.uint8)).resize((40, 40)).save(new)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_the_wheel_to_predictions_in_three_commands(photos: Path) -> None:
    (block,) = re.findall(r"<!-- transcript -->\n```bash\n(.*?)\n```\n\n```\n(.*?)```", TEXT, flags=re.DOTALL)
    install, *commands = block[0].splitlines()
    assert len(commands) + 1 <= 5
    site = photos / "site"
    quietly = {"capture_output": True, "text": True, "check": True}
    pip = [sys.executable, "-m", "pip"]
    # From a copy, which a build leaves its traces in.
    shutil.copytree(
        ROOT,
        photos / "source",
        ignore=shutil.ignore_patterns(".git", "*.egg-info", "results", "__pycache__", ".*_cache"),
    )
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", ".", str(photos / "source")], **quietly
    )
    assert shlex.split(install)[:2] == ["pip", "install"]
    # What it needs is installed already, and is left out.
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(site), *shlex.split(install)[2:]], **quietly
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    found = [sys.executable, "-c", "import snell_lightning; print(snell_lightning.__file__)"]
    assert subprocess.run(found, env=environment, **quietly).stdout.startswith(str(site))

    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "python"
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with open("predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == block[1].splitlines()[0].split(",")
    assert [(row["image"], row["class"]) for row in rows] == [("new_photos/a.png", "cat"), ("new_photos/b.png", "dog")]


def test_the_lines_of_python_run(work: Path, photos: Path) -> None:
    os.chdir(work)
    for name in ("birds", "insects"):
        Path(name).mkdir()
        shutil.copy("runs/version_0/adapter.safetensors", name)
    os.symlink(photos / "new_photos", "new_photos")
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == 2
    assert len(list(filter(None, blocks[0].splitlines()))) == 3
    scope: dict = {}
    for block in blocks:
        exec(block, scope)

    assert scope["prediction"].label in scope["classifier"].classes
    assert scope["classifier"].adapters == ("birds", "insects")
    assert scope["classifier"].active_adapter == "birds"


def test_training_stops_where_the_score_no_longer_rises(work: Path, command: Command) -> None:
    (line,) = re.findall(r"fit --config vit.yaml (--trainer.callbacks\+=EarlyStopping .*)", TEXT)
    options = shlex.split(line)
    options[options.index("--trainer.callbacks.patience") + 1] = "1"

    # A rate at which nothing is learnt.
    done = command("fit", *QUICK, "--trainer.max_epochs", "9", "--model.optimizer.lr", "1e-12", *options)

    assert done.status == 0, done.err
    with open(Path("runs") / "version_1" / "metrics.csv", newline="") as file:
        epochs = {int(row["epoch"]) for row in csv.DictReader(file) if row["val/acc1"]}
    assert epochs == {0, 1}
