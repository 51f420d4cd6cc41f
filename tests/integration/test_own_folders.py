"""What happens on people's own folders between one command and the next: the right labels, images, sizes and files.

The images are of two or three plain colours with noise, which a few steps learn: a tuned model scores near 1, and
anything that goes wrong with labels, pixels or weights shows in its accuracy.
"""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pillow_heif import register_heif_opener

from snell_lightning.adapters import read_adapter

from .conftest import Command

COLOURS = {"ant": (220, 30, 30), "bee": (30, 200, 60), "cat": (40, 60, 230)}
BASE = ("--config", "vit.yaml", "--config", "data/folder.yaml", "--data.root", "photos")
FAST = (
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"),
    *("--data.batch_size", "16"),
)
FIT = ("fit", *BASE, *FAST, "--trainer.max_epochs", "4", "--model.adapter.rank", "2", "--model.warmup", "0")
ADAPTER = ("--model.adapter_file", "runs/version_0/adapter.safetensors")
CHECKPOINT = ("--ckpt_path", "runs/version_0/checkpoints/last.ckpt")


def paint(folder: Path, colour: Sequence[int], count: int, seed: int = 0) -> None:
    """Fill a folder with noisy images of one colour; no two are the same."""
    random = np.random.default_rng([seed, *colour])
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.clip(random.normal(colour, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")


def accuracy(out: str, name: str = "test/acc1") -> float:
    (line,) = (line for line in out.splitlines() if name in line)
    return float(line.replace("│", " ").split()[1])


def predicted(path: Path) -> dict[str, str]:
    """The class that each image was given."""
    with path.open() as file:
        return {row["image"]: row["class"] for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos` of three classes and a run on them in `runs/version_0`."""
    folder = tmp_path_factory.mktemp("own")
    for name, colour in COLOURS.items():
        paint(folder / "photos" / name, colour, 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["snell_lightning"])
        from snell_lightning.cli import main

        main(FIT)
    return folder


@pytest.fixture
def here(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder during a test: a copy of the fitted one."""
    folder = tmp_path / "here"
    shutil.copytree(fitted, folder)
    monkeypatch.chdir(folder)
    return folder


def test_the_model_of_these_tests_is_right_about_its_own_images(here: Path, command: Command) -> None:
    done = command("test", *BASE, *FAST, *ADAPTER)
    assert (done.status, done.errors) == (0, [])
    assert accuracy(done.out) > 0.95


class TestA1ClassNames:
    """Labels are mapped by the tuned model's class names."""

    @pytest.mark.parametrize("verb", ["validate", "test", "predict", "fit"])
    @pytest.mark.parametrize("tuned", [ADAPTER, CHECKPOINT], ids=["adapter", "checkpoint"])
    def test_a_renamed_class_is_one_line_that_lists_both(
        self, verb: str, tuned: tuple[str, ...], here: Path, command: Command
    ) -> None:
        (here / "photos/ant").rename(here / "photos/zant")
        done = command(verb, *BASE, *FAST, *tuned)
        assert done.status == 1
        (line,) = done.errors
        assert "the images are of the classes bee, cat, zant, and the model's are ant, bee, cat" in line
        assert not (here / "runs/version_1").exists()

    def test_all_folders_renamed_is_one_line_too(self, here: Path, command: Command) -> None:
        for old, new in {"ant": "zebra", "bee": "yak", "cat": "wolf"}.items():
            (here / "photos" / old).rename(here / "photos" / new)
        done = command("test", "--config", "runs/version_0/config.yaml")
        assert done.status == 1
        assert "of the classes wolf, yak, zebra, and the model's are ant, bee, cat" in done.errors[0]

    def test_a_class_that_is_missing_shifts_no_label(self, here: Path, command: Command) -> None:
        shutil.rmtree(here / "photos/ant")
        done = command("test", *BASE, *FAST, *ADAPTER)
        assert (done.status, done.errors) == (0, [])
        assert accuracy(done.out) > 0.95
        done = command("predict", *BASE, *FAST, *ADAPTER)
        wrong = {
            path: name for path, name in predicted(here / "runs/predict_0/predictions.csv").items() if name not in path
        }
        assert wrong == {}

    def test_resuming_without_a_class_is_refused(self, here: Path, command: Command) -> None:
        shutil.rmtree(here / "photos/ant")
        done = command("fit", *BASE, *FAST, *CHECKPOINT, "--trainer.max_epochs", "6")
        assert done.status == 1
        assert "no image to train on of ant" in done.errors[0]


class TestA2TheRunsOwnAdapter:
    """The config in a run's folder stands for the run."""

    def test_its_adapter_is_tested_and_named(self, here: Path, command: Command) -> None:
        done = command("test", "--config", "runs/version_0/config.yaml")
        assert (done.status, done.errors) == (0, [])
        assert accuracy(done.out) > 0.95
        assert "adapter: runs/version_0/adapter.safetensors, the run's own" in done.err

    def test_also_of_a_run_that_was_resumed_or_started_from_another_adapter(self, here: Path, command: Command) -> None:
        more = ("--trainer.max_epochs", "5")
        assert command(*FIT, *CHECKPOINT, *more).status == 0
        assert command(*FIT, *ADAPTER).status == 0
        for run in ("version_1", "version_2"):
            done = command("predict", "--config", f"runs/{run}/config.yaml")
            assert f"adapter: runs/{run}/adapter.safetensors, the run's own" in done.err


class TestA3TheSplit:
    """Test never sees a training image."""

    @pytest.mark.parametrize("tuned", [ADAPTER, CHECKPOINT], ids=["adapter", "checkpoint"])
    def test_photos_added_and_removed_move_no_other_one(
        self, tuned: tuple[str, ...], here: Path, command: Command
    ) -> None:
        sides = {
            split: set(self.images(here, command, split, tuned, number))
            for number, split in enumerate(("train", "val", "test"))
        }
        paint(here / "photos/new", COLOURS["bee"], 7, seed=1)
        for path in (here / "photos/new").iterdir():
            path.rename(here / "photos/bee" / f"new{path.name}")
        (here / "photos/new").rmdir()
        for split in sides:
            (here / sorted(sides[split])[0]).unlink()
        again = {
            split: set(self.images(here, command, split, tuned, number))
            for number, split in enumerate(("train", "val", "test"), 3)
        }
        for split, paths in again.items():
            others = set().union(*(sides[other] for other in sides if other != split))
            assert paths & others == set(), split

    @staticmethod
    def images(here: Path, command: Command, split: str, tuned: tuple[str, ...], number: int) -> dict[str, str]:
        assert command("predict", *BASE, *FAST, *tuned, "--data.eval_split", split).status == 0
        return predicted(here / f"runs/predict_{number}/predictions.csv")

    @pytest.mark.parametrize("option", ["--data.seed", "--data.val_fraction", "--data.test_fraction"])
    @pytest.mark.parametrize("verb", ["test", "fit"])
    def test_another_split_than_the_tuned_models_is_refused(
        self, option: str, verb: str, here: Path, command: Command
    ) -> None:
        value = "7" if option == "--data.seed" else "0.4"
        done = command(verb, *BASE, *FAST, *CHECKPOINT, option, value)
        assert done.status == 1
        assert f"was tuned with {option[2:]}" in done.errors[0]

    def test_in_a_config_another_split_gives_way_to_the_tuned_models(self, here: Path, command: Command) -> None:
        Path("other.yaml").write_text("data:\n  seed: 7\n  val_fraction: 0.4\n  test_fraction: 0.4\n")
        assert command("predict", *BASE, "--config", "other.yaml", *FAST, *CHECKPOINT).status == 0
        assert command("predict", *BASE, *FAST, *CHECKPOINT).status == 0
        first, second = (predicted(here / f"runs/predict_{number}/predictions.csv") for number in (0, 1))
        assert first == second


class TestA4Orientation:
    """Photographs are turned as EXIF says."""

    def test_turned_photos_are_told_apart_as_well_as_upright_ones(self, here: Path, command: Command) -> None:
        # Bright above or bright to the left: a quarter turn makes the one look like the other.
        for name, box in {"above": (0, 0, 32, 16), "left": (0, 0, 16, 32)}.items():
            for split, count in {"train": 24, "val": 6, "test": 12}.items():
                paint(here / "turned" / split / name, (60, 60, 60), count, seed=len(name) + count)
                for path in (here / "turned" / split / name).iterdir():
                    with Image.open(path) as image:
                        image.paste((240, 240, 200), box)
                        # As a phone held upright stores it: a quarter turn clockwise is to be made.
                        exif = Image.Exif()
                        exif[0x0112] = 6
                        if split == "test":
                            image.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".jpg"), exif=exif)
                            path.unlink()
                        else:
                            image.save(path)
        options = ("--data.root", "turned", "--data.augmentation", "none", "--trainer.max_epochs", "6")
        assert command(*FIT, *options).status == 0
        done = command("test", "--config", "runs/version_1/config.yaml")
        assert accuracy(done.out) == 1


class TestA5SplitFolders:
    """Split folders are recognised whatever their case and usual spelling, and what is not used is named."""

    def test_training_and_testing_in_capitals(
        self, here: Path, command: Command, caplog: pytest.LogCaptureFixture
    ) -> None:
        for split, count in {"Training": 20, "Valid": 4, "Testing": 6}.items():
            for name, colour in COLOURS.items():
                paint(here / "ready" / split / name, colour, count, seed=count)
        paint(here / "ready/drafts", (0, 0, 0), 2)
        assert command(*FIT, "--data.root", "ready").status == 0
        assert "60 train / 12 val / 18 test images, 3 classes" in caplog.text
        assert "data: not used beside Training/: drafts/" in caplog.text
        _, metadata = read_adapter("runs/version_1/adapter.safetensors")
        assert metadata["classes"] == ["ant", "bee", "cat"]
        done = command(
            "test", *BASE, *FAST, "--data.root", "ready", "--model.adapter_file", "runs/version_1/adapter.safetensors"
        )
        assert accuracy(done.out) > 0.9


class TestA6EverythingIsInTheFile:
    """What an adapter needs holds wherever its file is named, unless the command line says otherwise."""

    SETTINGS = (
        *("--data.normalization", "imagenet", "--data.image_size", "48", "--data.augmentation", "none"),
        # No weight tells that a model was made with this.
        *("--model.backbone_args", "{act_layer: relu}"),
    )

    def test_base_configs_give_the_score_of_the_runs_own(self, here: Path, command: Command) -> None:
        assert command(*FIT, *self.SETTINGS).status == 0
        _, metadata = read_adapter("runs/version_1/adapter.safetensors")
        assert metadata["val/acc1"] > 0.9
        assert metadata["image_size"] == 48
        own = command("validate", "--config", "runs/version_1/config.yaml")
        scores = [accuracy(own.out, "val/acc1")]
        best = next(Path("runs/version_1/checkpoints").glob("epoch=*.ckpt"))
        for tuned in (
            ("--model.adapter_file", "runs/version_1/adapter.safetensors"),
            ("--ckpt_path", str(best)),
        ):
            done = command("validate", *BASE, *FAST, *tuned)
            assert (done.status, done.errors) == (0, [])
            scores.append(accuracy(done.out, "val/acc1"))
        assert scores == pytest.approx([metadata["val/acc1"]] * 3, abs=1e-6)

    def test_what_the_command_line_says_otherwise_holds_and_is_said(self, here: Path, command: Command) -> None:
        done = command("test", *BASE, *FAST, *ADAPTER, "--data.normalization", "imagenet", "--data.image_size=16")
        # 16 pixels have other position embeddings: the adapter is not for them.
        assert done.status == 1
        assert "data.normalization: imagenet, in place of {'mean': [0.5, 0.5, 0.5], 'std'" in done.err
        assert "data.image_size: 16, in place of 32 in runs/version_0/adapter.safetensors" in done.err

    def test_other_backbone_args_are_said_or_refused(self, here: Path, command: Command) -> None:
        done = command("test", *BASE, *FAST, *ADAPTER, "--model.backbone_args", "{act_layer: relu}")
        assert "model.backbone_args: {act_layer: relu}, in place of {} in runs/version_0/adapter" in done.err
        done = command("test", *BASE, *FAST, *ADAPTER, "--model.backbone_args", "{depth: 3}")
        assert done.status == 1
        assert "was made with model.backbone_args {}, and the backbone has {'depth': 3}: give it the" in done.errors[0]


class TestA7ToA9Files:
    """Formats, depths, endings and links, as one meets them on the command line."""

    def test_a_folder_of_everything_is_read_and_what_is_left_out_is_said(
        self, here: Path, command: Command, caplog: pytest.LogCaptureFixture
    ) -> None:
        (here / "photos/ant/up").symlink_to("..")
        paint(here / "photos/bee/@eaDir", COLOURS["cat"], 9)
        (here / "photos/bee/notes.txt").write_text("a note")
        for number, ending in enumerate(("gif", "jfif", "avif", "jp2", "heic")):
            path = here / f"photos/cat/{number:02}.png"
            with Image.open(path) as image:
                register_heif_opener()
                image.save(path.with_suffix(f".{ending}"))
            path.unlink()
        # A cut-out: red pixels are hidden under the blue that is seen.
        with Image.open(here / "photos/cat/20.png") as image:
            Image.merge("RGBA", (*image.split(), Image.new("L", image.size, 255))).save(image.filename)
        done = command("test", *BASE, *FAST, *ADAPTER, "--data.eval_split", "all")
        assert (done.status, done.errors) == (0, [])
        assert accuracy(done.out) > 0.95
        assert "data: left out by ending: 1 .txt" in caplog.text
        assert "data: left out 1 links to images and folders that are listed already" in caplog.text
        done = command("predict", *BASE, *FAST, *ADAPTER, "--data.eval_split", "all")
        assert len(predicted(here / "runs/predict_0/predictions.csv")) == 90

    def test_deep_grey_images_score_as_their_8_bit_copies(self, here: Path, command: Command) -> None:
        random = np.random.default_rng(0)
        for split, count in {"train": 20, "val": 5, "test": 8}.items():
            for name, level in {"dark": 60, "light": 190}.items():
                (here / "grey" / split / name).mkdir(parents=True)
                for number in range(count):
                    grey = np.clip(random.normal(level, 30, (32, 32)), 0, 255)
                    grey[0, 0] = 255
                    as_stored = {0: grey * 257, 1: grey * (4095 / 255)}.get(number % 3, grey)
                    pixels = as_stored.astype(np.uint8 if number % 3 == 2 else np.uint16)
                    if split != "test":
                        pixels = grey.astype(np.uint8)
                    Image.fromarray(pixels).save(here / "grey" / split / name / f"{number}.png")
        assert command(*FIT, "--data.root", "grey", "--data.augmentation", "none").status == 0
        assert accuracy(command("test", "--config", "runs/version_1/config.yaml").out) == 1


class TestA10SmallClasses:
    """Classes of three images have one in each split; of two there is a line."""

    def test_each_split_has_each_class_or_a_line_says_which_lacks_it(
        self, here: Path, command: Command, caplog: pytest.LogCaptureFixture
    ) -> None:
        for number in range(3):
            paint(here / f"uneven/big{number}", (80 * number, 0, 0), 30)
            paint(here / f"uneven/small{number}", (0, 80 * number, 0), 3)
        paint(here / "uneven/two", (0, 0, 200), 2)
        assert command(*FIT, "--data.root", "uneven", "--trainer.max_epochs", "1").status == 0
        assert "data: no test image of two" in caplog.text
        assert "no val image" not in caplog.text
        tuned = ("--model.adapter_file", "runs/version_1/adapter.safetensors", "--data.root", "uneven")
        for number, (split, missing) in enumerate({"test": ["two"], "val": [], "train": []}.items()):
            assert command("predict", *BASE, *FAST, *tuned, "--data.eval_split", split).status == 0
            there = {Path(path).parent.name for path in predicted(here / f"runs/predict_{number}/predictions.csv")}
            assert {path.name for path in (here / "uneven").iterdir()} - there == set(missing)


class TestA11NothingToRead:
    """A split of which nothing can be read is an error, whatever is done about bad images."""

    @pytest.mark.parametrize("split", ["train", "val", "test"])
    def test_is_an_error_and_no_adapter_is_written(self, split: str, here: Path, command: Command) -> None:
        for part in ("train", "val", "test"):
            for name, colour in COLOURS.items():
                paint(here / "ready" / part / name, colour, 4, seed=len(part))
        for path in (here / "ready" / split).rglob("*.png"):
            path.write_bytes(path.read_bytes()[:200])
        options = ("--data.root", "ready", "--data.on_bad_image", "skip")
        done = command(*FIT, *options) if split != "test" else command("test", *BASE, *FAST, *ADAPTER, *options)
        assert done.status == 1
        assert f"not one {split} image could be read" in done.errors[0]
        assert not (here / "runs/version_1/adapter.safetensors").exists()
        if split == "test":
            done = command("predict", *BASE, *FAST, *ADAPTER, *options)
            assert done.status == 1
            assert "none of the 12 images could be read; the reasons are in" in done.errors[0]


class TestB:
    """Tracebacks and messages that misled."""

    @pytest.mark.parametrize("size", ["16", "48", "224"])
    def test_b1_the_embedded_backbone_takes_other_image_sizes(self, size: str, here: Path, command: Command) -> None:
        options = ("--data.image_size", size, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1")
        done = command(*FIT, *options, "--data.batch_size", "2", "--trainer.limit_val_batches", "1")
        assert (done.status, done.errors) == (0, [])
        assert read_adapter("runs/version_1/adapter.safetensors")[1]["image_size"] == int(size)

    def test_b3_an_unreadable_image_keeps_its_row_with_the_reason(self, here: Path, command: Command) -> None:
        path = here / "photos/cat/00.png"
        path.write_bytes(path.read_bytes()[:200])
        options = ("--data.eval_split", "all", "--data.on_bad_image", "skip")
        done = command("predict", *BASE, *FAST, *ADAPTER, *options)
        assert (done.status, done.errors) == (0, [])
        with (here / "runs/predict_0/predictions.csv").open() as file:
            rows = {row["image"]: row for row in csv.DictReader(file)}
        assert len(rows) == 90
        bad = rows["photos/cat/00.png"]
        assert (bad["class"], bad["probability"]) == ("", "")
        assert "truncated" in bad["error"]
        assert all(row["class"] and not row["error"] for row in rows.values() if row is not bad)

    def test_b3_a_file_name_that_is_no_text_is_written_as_it_is(self, here: Path, command: Command) -> None:
        # As an archive of another system's encoding leaves it.
        os.rename(b"photos/cat/00.png", b"photos/cat/caf\xe9.png")
        done = command("predict", *BASE, *FAST, *ADAPTER, "--data.eval_split", "all")
        assert (done.status, done.errors) == (0, [])
        assert b"photos/cat/caf\xe9.png,cat," in (here / "runs/predict_0/predictions.csv").read_bytes()

    def test_b2_two_runs_that_start_at_once_get_a_folder_each(self, here: Path) -> None:
        shutil.rmtree(here / "runs")
        arguments = [sys.executable, "-m", "snell_lightning", *FIT, "--trainer.max_steps", "1"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}
        runs = [
            subprocess.Popen(arguments, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for _ in range(2)
        ]
        printed = [run.communicate(timeout=240)[0].decode() for run in runs]
        assert [run.returncode for run in runs] == [0, 0], printed
        for number in range(2):
            assert (here / f"runs/version_{number}/adapter.safetensors").is_file()
        assert "runs/version_1" in "".join(printed)
        assert "runs/version_0" in "".join(printed)

    def test_d9_a_folder_that_is_taken_by_name_is_left_alone(self, here: Path, command: Command) -> None:
        before = {path: path.read_bytes() for path in (here / "runs").rglob("*") if path.is_file()}
        done = command(*FIT, "--trainer.logger.version", "version_0")
        assert (done.status, done.errors) == (0, [])
        assert {path: path.read_bytes() for path in before} == before
        assert (here / "runs/version_0_1/adapter.safetensors").is_file()
