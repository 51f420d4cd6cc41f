"""A user's mistake ends a command with one line that says what to do, and costs nothing that was there before."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from snell_lightning.backbones import EMBEDDED_BACKBONE
from snell_lightning.checkpoints import read_checkpoint, write_checkpoint

from .conftest import QUICK, Command

CHECKPOINT = "runs/version_0/checkpoints/last.ckpt"
ADAPTER = "runs/version_0/adapter.safetensors"
OTHER_BACKBONE = (
    *("--model.backbone", "test_vit", "--model.pretrained", "false"),
    *("--model.backbone_args", "{img_size: 32}", "--data.image_size", "32"),
)


def fill(folder: Path, count: int) -> None:
    """Write numbered images of noise."""
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg")


def from_folder(root: str) -> tuple[str, ...]:
    return ("--data.source", "folder", "--data.root", root)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(work: Path, command: Command) -> Callable[..., str]:
    """A function that runs a command line, requires it to fail as a user's mistake should, and gives the message.

    `new` names the files that may be there afterwards and were not before.
    """

    def run(*arguments: str, new: tuple[str, ...] = ()) -> str:
        before = contents(work)
        outcome = command(*arguments)
        after = contents(work)
        assert outcome.status == 1
        assert len(outcome.errors) == 1, outcome.err
        assert "Traceback" not in outcome.err
        assert {name: after.get(name) for name in before} == before
        added = [name for name in after.keys() - before.keys() if not Path(name).match("events.out.*")]
        assert [name for name in added if Path(name).name not in new] == []
        return outcome.errors[0]

    return run


Refused = Callable[..., str]
# What a run has written before it looks into the data or the checkpoint.
STARTED = (".unfinished", "config.yaml", "hparams.yaml")
EVALUATED = ("config.yaml", "hparams.yaml")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--model.backbone", "vit_bse_patch16_224"), ["did you mean vit_base_patch16_224"]),
        (("--model.backbone", "vit_base_patch16_224.nope"), ["vit_base_patch16_224.augreg_in21k"]),
        (("--model.backbone_args", "{depht: 3}"), ["depht", EMBEDDED_BACKBONE]),
        (("--model.backbone_args", "{class_token: false}"), ["cannot be made with {'class_token': False}"]),
        (("--model.bakbone", "test_vit"), ["'model.bakbone'", "did you mean 'model.backbone'?"]),
        (("--model.adapter.rnk=3",), ["'model.adapter.rnk'", "did you mean 'model.adapter.rank'?"]),
        (("--data.rank", "3"), ["'data.rank'", "did you mean 'model.adapter.rank'?"]),
        (("--rank", "3"), ["'rank'", "did you mean 'model.adapter.rank'?"]),
        (("--optimizer.lr", "1e-3"), ["'optimizer.lr'", "did you mean 'model.optimizer.lr'?"]),
        (("--chekpoint.mode", "min"), ["'chekpoint.mode'", "did you mean 'checkpoint.mode'?"]),
        # A key is never completed: what is meant could change with the next version.
        (("--trainer.max_epoch", "3"), ["'trainer.max_epoch'", "did you mean 'trainer.max_epochs'?"]),
        (("--config", "vti.yaml"), ["'vti.yaml'", "did you mean vit.yaml?"]),
        (("--config",), ["--config needs a value"]),
        (("--model.adapter.rank", "many"), ["model.adapter.rank: expected int, not many"]),
        (("--data.batch_size", "1.5"), ["data.batch_size: expected int, not 1.5"]),
        (("--data.augmentation", "heavy"), ["data.augmentation", "'crop', 'light', 'none'", "heavy"]),
        (("--model.adapter.rank", "3"), ["rank", "multiple of pieces (2), not 3", "4 would do"]),
        (("--model.adapter.sparsity", "1.0"), ["sparsity must be at least 0 and below 1, not 1.0"]),
        (("--model.adapter.kernel", "distanse"), ["distance, linear", "'distanse'"]),
        (("--model.adapter.sparsifier", "sfot"), ["did you mean soft?"]),
        (("--model.adapter.targets", "[nothere]"), ["'nothere' matches nothing", "blocks.0.attn"]),
        (("--model.warmup", "1"), ["warmup must be", "not 1"]),
        (("--model.num_classes", "5"), ["model.num_classes comes from the number of class folders", "leave it out"]),
        (("--data.backbone", "test_vit"), ["data.backbone comes from model.backbone; leave it out"]),
        (("--model.image_size=48",), ["model.image_size comes from data.image_size; leave it out"]),
        (("--data.image_size", "1"), ["does not take images of 1 x 1 pixels", "data.image_size", "32 x 32"]),
        (("--trainer.accelerator", "abacus"), ["abacus"]),
        (("--checkpoint.mode", "most"), ["min, max", "most"]),
        (from_folder("nowhere"), ["data.root nowhere does not exist"]),
        (("--trainer.logger.save_dir", "config.txt/below"), ["config.txt/below"]),
    ],
)
def test_a_wrong_value_is_named_before_anything_is_written(
    arguments: tuple[str, ...], expected: list[str], refused: Refused
) -> None:
    Path("config.txt").write_text("a file where a folder is asked for")
    message = refused("fit", *QUICK, *arguments)
    assert [part for part in expected if part not in message] == [], message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model:\n  bakbone: test_vit\n", ["'model.bakbone'", "did you mean 'model.backbone'?"]),
        ("model:\n  adapter:\n    rnk: 3\n", ["'model.adapter.rnk'", "did you mean 'model.adapter.rank'?"]),
        ("data:\n  rank: 3\n", ["'data.rank'", "did you mean 'model.adapter.rank'?"]),
        ("model:\n  num_classes: 5\n", ["model.num_classes comes from", "leave it out"]),
        ("rank: 3\n", ["'rank'", "did you mean 'model.adapter.rank'?"]),
        ("model:\n  adapter:\n    sparsity: much\n", ["model.adapter.sparsity: expected float, not much"]),
        ("trainer:\n  max_epochs: ten\n", ["trainer.max_epochs: expected int, not ten"]),
        ("model: {\n", ["mine.yaml is not valid YAML in line 2"]),
        ("model:\n\tbackbone: test_vit\n", ["mine.yaml is not valid YAML in line 2"]),
        ("just text\n", ["mine.yaml holds no settings"]),
        ("# nothing yet\n", ["mine.yaml holds no settings"]),
        ("model: \0\n", ["mine.yaml is not valid YAML"]),
    ],
)
def test_a_mistake_in_a_config_file_is_named(text: str, expected: list[str], refused: Refused) -> None:
    Path("mine.yaml").write_text(text)
    message = refused("fit", *QUICK, "--config", "mine.yaml")
    assert [part for part in expected if part not in message] == [], message


def test_an_unknown_command_is_answered_with_the_known_ones(refused: Refused) -> None:
    known = "fit, validate, test, predict, merge, memory, check-data"
    assert f"there is no command 'fti'; expected one of {known}" in refused("fti", *QUICK)
    assert f"name a command: {known}; --help says more" in refused()


def test_an_empty_class_folder_and_a_single_class_are_named(work: Path, refused: Refused) -> None:
    fill(work / "images" / "cats", 4)
    assert "images has only one class folder, 'cats'" in refused("fit", *QUICK, *from_folder("images"))
    (work / "images" / "dogs").mkdir()
    assert "class folder images/dogs has no images" in refused("fit", *QUICK, *from_folder("images"))


@pytest.fixture
def one_is_cut(work: Path) -> str:
    """Images without a test split, one of them cut off in its middle; the path of that one."""
    for name, count in {"train/cats": 4, "train/dogs": 4, "val/cats": 1, "val/dogs": 1}.items():
        fill(work / "images" / name, count)
    path = work / "images" / "train" / "cats" / "2.jpg"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "images/train/cats/2.jpg"


def test_a_truncated_image_is_named(one_is_cut: str, refused: Refused) -> None:
    message = refused("fit", *QUICK, *from_folder("images"), new=STARTED)
    assert f"cannot read image {one_is_cut}" in message
    assert "data.on_bad_image" in message


def test_truncated_images_are_left_out_and_counted_if_that_is_asked_for(
    one_is_cut: str, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    done = command("fit", *QUICK, *from_folder("images"), "--data.on_bad_image", "skip")
    assert (done.status, done.errors) == (0, [])
    assert f"skipped 1 unreadable image(s) of train: {one_is_cut}" in caplog.text
    assert torch.load("runs/version_1/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_b5_evaluating_without_test_images_says_which_splits_there_are(
    verb: str, one_is_cut: str, command: Command, refused: Refused
) -> None:
    skip = ("--data.on_bad_image", "skip")
    assert command("fit", *QUICK, *from_folder("images"), *skip).status == 0
    tuned = ("--config", "runs/version_1/config.yaml")
    message = refused(verb, *tuned, new=EVALUATED)
    assert "has no test images here, but 8 train and 2 val; set data.eval_split to one of these" in message
    done = command(verb, *tuned, "--data.eval_split", "val")
    assert (done.status, done.errors) == (0, [])


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a2_evaluating_what_was_never_tuned_is_refused(verb: str, work: Path, refused: Refused) -> None:
    assert f"{verb} needs a tuned model: name one with" in refused(verb, "--config", "vit.yaml")
    (work / ADAPTER).unlink()
    message = refused(verb, "--config", "runs/version_0/config.yaml")
    assert "the run in runs/version_0 has no adapter.safetensors; name what is to be used with --ckpt_path" in message


def test_a_checkpoint_of_another_backbone_is_refused(refused: Refused) -> None:
    message = refused("fit", *QUICK, *OTHER_BACKBONE, "--ckpt_path", CHECKPOINT, new=STARTED)
    assert f"belongs to the backbone '{EMBEDDED_BACKBONE}', not to 'test_vit'" in message


def test_a_checkpoint_of_another_rank_is_refused(refused: Refused) -> None:
    message = refused("fit", *QUICK, "--model.adapter.rank", "4", "--ckpt_path", CHECKPOINT, new=STARTED)
    assert "is (2, 144, 1) in the checkpoint and (2, 144, 2) in the model" in message


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("the-payload-ran",))


def write_damaged(kind: str, path: Path) -> None:
    whole = Path(CHECKPOINT).read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "overwritten in its middle":
        path.write_bytes(whole[: len(whole) // 2] + bytes(2000) + whole[len(whole) // 2 + 2000 :])
    elif kind == "text":
        path.write_text("this is no checkpoint")
    elif kind == "empty":
        path.touch()
    elif kind == "of another program":
        torch.save({"state_dict": {}, "hyper_parameters": {}}, path)
    elif kind == "pickled payload":
        path.write_bytes(pickle.dumps(Payload(), protocol=2))
    elif kind == "payload in its settings":
        write_checkpoint({**read_checkpoint(CHECKPOINT), "hyper_parameters": {"a": Payload()}}, path)


_NO_SUM = "is damaged, or is no checkpoint of this package: the sum at its end is missing"
DAMAGED = {
    "truncated": _NO_SUM,
    "overwritten in its middle": "is damaged: its contents and the sum at its end do not agree",
    "text": _NO_SUM,
    "empty": _NO_SUM,
    "of another program": _NO_SUM,
    "pickled payload": _NO_SUM,
    "payload in its settings": "is not a checkpoint of this package (UnpicklingError)",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_whole_checkpoint_is_refused_and_not_run(kind: str, work: Path, refused: Refused) -> None:
    write_damaged(kind, Path("damaged.ckpt"))
    message = refused("fit", *QUICK, "--ckpt_path", "damaged.ckpt")
    assert f"damaged.ckpt {DAMAGED[kind]}" in message
    assert not (work / "the-payload-ran").exists()


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_a_missing_checkpoint_is_refused(verb: str, refused: Refused) -> None:
    assert "there is no checkpoint no.ckpt" in refused(verb, *QUICK, "--ckpt_path", "no.ckpt")


def test_an_adapter_file_of_another_backbone_rank_or_number_of_classes_is_refused(work: Path, refused: Refused) -> None:
    given = ("--model.adapter_file", ADAPTER)
    message = refused("fit", *QUICK, *OTHER_BACKBONE, *given)
    assert f"belongs to the backbone '{EMBEDDED_BACKBONE}', not to 'test_vit'" in message
    message = refused("fit", *QUICK, "--model.adapter.rank", "4", *given)
    assert "tuned with rank 2 at blocks.0.attn.qkv, and the model was injected with 4" in message
    for name in ("cats", "dogs"):
        fill(work / "images" / name, 4)
    message = refused("fit", *QUICK, *from_folder("images"), *given)
    assert "images are of the classes cats, dogs, and the model's are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in message


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "pickled payload"])
def test_what_is_no_whole_adapter_file_is_refused_and_not_run(kind: str, work: Path, refused: Refused) -> None:
    if kind == "truncated":
        Path("damaged").write_bytes(Path(ADAPTER).read_bytes()[:20_000])
    else:
        write_damaged(kind, Path("damaged"))
    assert "damaged is not an adapter file" in refused("fit", *QUICK, "--model.adapter_file", "damaged")
    assert not (work / "the-payload-ran").exists()


def test_a_missing_adapter_file_is_refused(refused: Refused) -> None:
    assert "there is no adapter file no.safetensors" in refused(
        "test", *QUICK, "--model.adapter_file", "no.safetensors"
    )


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_last_good_checkpoint(
    work: Path, refused: Refused
) -> None:
    # Two epochs of two steps are done. Step 5 still has the good weights, step 6 those that the huge rate made.
    message = refused(
        *("fit", *QUICK, "--ckpt_path", CHECKPOINT, "--trainer.max_epochs", "4", "--model.optimizer.lr", "1e30"),
        new=(*STARTED, "metrics.csv", "epoch=0.ckpt", "epoch=1.ckpt", "adapter.safetensors"),
    )
    assert "the training loss is not a number at step 6 (epoch 2)" in message
    (good,) = (work / "runs" / "version_1" / "checkpoints").glob("*.ckpt")
    assert f"last good checkpoint: {good.relative_to(work)}" in message.replace(f"{work}/", "")
    for path in (good, work / CHECKPOINT):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_pretrained_weights_out_of_reach_are_answered_with_the_offline_choices(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "empty"), raising=False)
    message = refused("fit", *QUICK, "--model.backbone", "test_vit.r160_in1k")
    for expected in ("'test_vit.r160_in1k'", EMBEDDED_BACKBONE, "local-dir:PATH", "HF_HOME"):
        assert expected in message


def test_pretrained_weights_that_do_not_exist_are_refused(refused: Refused) -> None:
    message = refused("fit", *QUICK, "--model.backbone", "vit_base_patch16_gap_224")
    assert "has no pretrained weights in timm" in message
    assert "pretrained: false" in message


def test_training_without_an_end_is_refused(refused: Refused) -> None:
    message = refused("fit", *QUICK, "--trainer.max_epochs", "-1", new=STARTED)
    assert "set trainer.max_epochs or trainer.max_steps" in message


def test_as_a_program_the_one_line_is_all_there_is(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "snell_lightning", "fit", *QUICK, "--model.adapter.rnk", "3"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == ("error: there is no config key 'model.adapter.rnk'; did you mean 'model.adapter.rank'?\n")
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
