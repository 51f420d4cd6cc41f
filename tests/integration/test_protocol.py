"""`data.protocol`: what chooses the epoch, and that every place that prints its score says so."""

import csv
from pathlib import Path

import pytest

from snell_lightning import UserError, cli
from snell_lightning.adapters import read_adapter
from snell_lightning.data import ImageDataModule

FIT = (
    "fit", "--config", "vit.yaml", "--data.protocol", "published", "--trainer.max_epochs", "2",
    "--data.batch_size", "64", "--trainer.limit_train_batches", "2", "--trainer.enable_progress_bar", "false",
    "--model.adapter.rank", "2", "--trainer.accelerator", "cpu",
)  # fmt: skip
SAID = "on the test images, which chose the epoch: the published protocol"


def test_validation_images_are_trained_on_and_the_test_images_choose() -> None:
    default, published = (ImageDataModule(protocol=protocol) for protocol in ("validation", "published"))
    assert len(published.splits.train) == len(default.splits.train) + len(default.splits.val)
    assert published.splits.val == published.splits.test
    assert len(published.splits.test) == len(default.splits.test)
    assert "val" not in published.describe().split("images")[0]
    assert published.describe().endswith(SAID)
    assert SAID not in default.describe()


def test_without_test_images_there_is_nothing_to_report() -> None:
    with pytest.raises(
        UserError, match=r"data.protocol published reports the best score on test images, and there are"
    ):
        ImageDataModule(protocol="published", test_fraction=0.0)
    with pytest.raises(UserError, match=r"data.protocol is 'papers'; expected one of validation, published"):
        ImageDataModule(protocol="papers")  # type: ignore[arg-type]


def test_every_place_that_prints_the_score_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    cli.main(FIT)
    printed = capsys.readouterr()
    assert SAID in printed.out
    assert "best test_by_epoch/acc1" in printed.out
    run = tmp_path / "runs" / "version_0"
    with (run / "metrics.csv").open(newline="") as file:
        columns = next(csv.reader(file))
    assert {"test_by_epoch/acc1", "test_by_epoch/loss"} <= set(columns)
    assert not [name for name in columns if name.startswith("val/")]
    assert (run / "test_by_epoch_classes.csv").is_file()
    metadata = read_adapter(run / "adapter.safetensors")[1]
    assert metadata["protocol"] == "published"
    assert "test_by_epoch/acc1" in metadata
    assert not [name for name in metadata if name.startswith("val/")]

    # What is tested with it afterwards are the images that chose it.
    cli.main(["test", "--config", str(run / "config.yaml"), "--trainer.enable_progress_bar", "false"])
    assert SAID in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["merge", "--adapter", str(run / "adapter.safetensors"), "--output", "merged"])
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"## Scores {SAID}" in card
    assert "| accuracy |" in card
