"""The data module: what is known at construction, which process sees what, and unreadable images."""

import logging
import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import psutil
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter

from snell_lightning.adapters.errors import UserError
from snell_lightning.data import SOURCES, ImageDataModule
from snell_lightning.data.dataset import ImageLoader

MakeImages = Callable[[Mapping[str, int]], Path]


def truncate(path: Path) -> None:
    """Cut an image file in the middle of its pixels."""
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def of_folder(root: Path, **arguments: Any) -> ImageDataModule:
    return ImageDataModule("folder", str(root), augmentation="none", image_size=8, normalization="none", **arguments)


def on_process(data: ImageDataModule, rank: int, world: int) -> ImageDataModule:
    """Stand-in for a trainer of several processes."""
    sharding = {"num_replicas": world, "rank": rank}
    on_cpu = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=sharding, strategy=on_cpu)  # type: ignore[assignment]
    return data


def numbers(loader: ImageLoader) -> list[list[int]]:
    """The numbers of the images in each batch, which are their redness in steps of 20."""
    return [[round(float(image[0].mean()) * 255 / 20) for image in images] for images, _ in loader]


@pytest.fixture
def root(make_images: MakeImages) -> Path:
    """Training images 0 to 10 in class a and 0 in class b; 5 images for validation, 3 for testing."""
    return make_images({"train/a": 11, "train/b": 1, "val/a": 5, "test/a": 3})


def test_defaults_are_known_right_after_construction() -> None:
    data = ImageDataModule()
    assert (data.num_classes, data.class_names) == (10, tuple("0123456789"))
    assert (data.image_size, data.mean, data.std) == (32, (0.5,) * 3, (0.5,) * 3)
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype) == ((32, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((32,), torch.int64)


def test_image_size_and_normalization_come_from_the_backbone_unless_given(root: Path) -> None:
    data = ImageDataModule("folder", str(root), backbone="test_vit.r160_in1k")
    assert data.image_size == 160
    assert ImageDataModule(image_size=48, normalization="imagenet").mean == (0.485, 0.456, 0.406)


def test_sources_of_files_and_of_memory_are_registered() -> None:
    assert {"digits", "folder"} <= set(SOURCES)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"source": "mnist"}, "data.source is 'mnist'; expected one of digits, folder"),
        ({"source": "folder"}, "data.source folder needs data.root"),
        ({"root": "images"}, "data.source digits takes no data.root"),
        ({"backbone": "no_such_vit"}, "no_such_vit"),
        ({"batch_size": 0}, "data.batch_size is 0; expected a whole number of at least 1"),
        ({"eval_batch_size": 0}, "data.eval_batch_size is 0"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"seed": -1}, "data.seed is -1"),
        ({"classes": ["a", "b", "a"]}, "data.classes names a class twice: a, b, a"),
        ({"image_size": 0}, "data.image_size is 0"),
        ({"normalization": "zero"}, "data.normalization is 'zero'"),
        ({"normalization": {"mean": [0.5]}}, "data.normalization is .*; expected mean and std of three numbers each"),
        ({"eval_split": "tests"}, "data.eval_split is 'tests'; expected one of test, val, train, all"),
        ({"augmentation": "heavy"}, "data.augmentation is 'heavy'"),
        ({"on_bad_image": "ignore"}, "data.on_bad_image is 'ignore'; expected one of error, skip"),
        ({"val_fraction": 0.0}, "data.val_fraction is 0.0"),
        ({"test_fraction": 1.0}, "data.test_fraction is 1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
    ],
)
def test_each_wrong_argument_gets_one_line(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        ImageDataModule(**arguments)
    assert "\n" not in str(caught.value)


def test_b5_an_empty_test_split_is_named_with_what_to_take_instead(make_images: MakeImages) -> None:
    root = make_images({"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 2})
    data = of_folder(root)
    for loader in (data.test_dataloader, data.predict_dataloader):
        with pytest.raises(UserError, match=r"has no test images here, but 8 train and 3 val; set data.eval_split"):
            loader()
    for split, count in {"val": 3, "train": 8, "all": 11}.items():
        data = of_folder(root, eval_split=split)
        for loader in (data.test_dataloader, data.predict_dataloader):
            assert sum(len(images) for images, _ in loader()) == count


def test_b3_an_unreadable_image_keeps_its_row_in_predict_and_says_why(root: Path) -> None:
    truncate(root / "test/a/01.png")
    loader = of_folder(root, on_bad_image="skip").predict_dataloader()
    ((images, labels),) = list(loader)
    assert labels.tolist() == [0, 0, 0]
    assert [bool(image.isnan().all()) for image in images] == [False, True, False]
    assert list(loader.dataset.unreadable) == [1]
    assert "truncated" in loader.dataset.unreadable[1]
    with pytest.raises(UserError, match=r"cannot read image .*01.png"):
        list(of_folder(root).predict_dataloader())


def test_a1_labels_are_those_of_the_given_classes(make_images: MakeImages) -> None:
    root = make_images({"train/ant": 2, "train/bee": 3, "val/ant": 1, "val/bee": 1})
    data = of_folder(root, classes=["cat", "bee", "ant"])
    assert (data.num_classes, data.class_names) == (3, ("cat", "bee", "ant"))
    assert [label for _, label in data.splits.train] == [2, 2, 1, 1, 1]
    # Nothing to train cat on: fine for evaluation, an error for training.
    data.setup("test")
    with pytest.raises(UserError, match="no image to train on of cat; the model's classes are cat, bee, ant"):
        data.setup("fit")
    with pytest.raises(UserError, match="of the classes ant, bee, and the model's are bee, zant"):
        of_folder(root, classes=["bee", "zant"])


def test_balanced_weights_let_every_class_count_the_same(make_images: MakeImages) -> None:
    root = make_images({"train/a": 1, "train/b": 3, "val/a": 1})
    weights = of_folder(root, class_weights="balanced").loss_weights()
    assert weights is not None
    assert weights.tolist() == pytest.approx([4 / (2 * 1), 4 / (2 * 3)])
    assert of_folder(root).loss_weights() is None


def test_the_same_image_in_train_and_test_is_warned_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    def warnings() -> list[str]:
        caplog.clear()
        of_folder(root).setup("fit")
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    # The fixture's images are numbered alike in every split: 5 of val and 3 of test are in train.
    (line,) = warnings()
    assert "8 image(s) of val or test are in train too, by content, such as " in line
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(path.read_bytes() + path.name.encode())
    assert warnings() == []
    # Of the same size, but not the same.
    (root / "val/a/00.png").write_bytes(b"x" * (root / "train/a/00.png").stat().st_size)
    assert warnings() == []


def test_settings_hold_what_is_needed_to_use_a_model_and_give_the_same_data_again(make_images: MakeImages) -> None:
    root = make_images({"ant": 9, "bee": 9, "cat": 3})
    arguments = {"source": "folder", "root": str(root)}
    data = ImageDataModule(**arguments, image_size=48, normalization="imagenet", augmentation="light", seed=3)
    settings = data.settings()
    assert (settings["classes"], settings["image_size"]) == (["ant", "bee", "cat"], 48)
    assert settings["normalization"] == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert (settings["augmentation"], settings["crop_pct"], settings["interpolation"]) == ("light", None, "bicubic")
    split = settings.pop("split")
    given = {key: settings[key] for key in ("classes", "image_size", "normalization", "augmentation")}
    again = ImageDataModule(**arguments, **given, **split)
    assert again.splits == data.splits
    assert again.settings() == {**settings, "split": split}
    assert ImageDataModule(**arguments).settings()["crop_pct"] == 1.0


def test_fit_announces_the_data_in_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("snell_lightning.data.datamodule.rank_zero_info", lines.append)
    data = of_folder(root)
    data.setup("test")
    # What is odd is said whatever is done, and once.
    assert lines == ["data: no val image of b", "data: no test image of b"]
    lines.clear()
    data.setup("fit")
    assert lines == [
        "data: folder, 12 train / 5 val / 3 test images, 2 classes, 8 x 8 pixels, "
        "normalisation none (mean 0 0 0, std 1 1 1)"
    ]


def test_training_order_depends_on_seed_and_epoch_alone(root: Path) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        loader = of_folder(root, batch_size=4, seed=seed).train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        torch.manual_seed(epoch + 17)
        return numbers(loader)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_two_processes_see_one_processs_batches_in_the_same_steps(root: Path) -> None:
    alone = numbers(of_folder(root, batch_size=4).train_dataloader())
    ranks = [numbers(on_process(of_folder(root, batch_size=2), rank, 2).train_dataloader()) for rank in range(2)]
    assert [sorted(batch) for batch in alone] == [sorted(a + b) for a, b in zip(*ranks, strict=True)]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_evaluation_sees_each_image_once_in_equally_many_batches_per_process(
    root: Path, world: int, batch_size: int
) -> None:
    # 3 test images, so that with 4 processes one has none.
    for split in ("val", "test"):
        shards = []
        for rank in range(world):
            data = on_process(of_folder(root, batch_size=8, eval_batch_size=batch_size), rank, world)
            loader = getattr(data, f"{split}_dataloader")()
            shards.append(numbers(loader))
            assert len(loader) == len(shards[-1]) == len(shards[0])
        seen = sorted(number for shard in shards for batch in shard for number in batch)
        assert seen == list(range(len(getattr(data.splits, split))))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_truncated_image_stops_with_one_line_that_names_it(root: Path, num_workers: int) -> None:
    truncate(root / "train/a/04.png")
    loader = of_folder(root, batch_size=4, num_workers=num_workers).train_dataloader()
    with pytest.raises(UserError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(f"cannot read image {root / 'train/a/04.png'}: ")
    assert "truncated" in message
    assert message.endswith("; remove it or set data.on_bad_image to skip")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"not an image", "not an image in a format that PIL knows"), (None, "No such file")],
)
def test_foreign_and_vanished_files_are_named_too(root: Path, content: bytes | None, reason: str) -> None:
    path = root / "val/a/02.png"
    data = of_folder(root)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=f"cannot read image .*02.png: .*{reason}"):
        list(data.val_dataloader())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_images_are_left_out_and_counted_in_every_pass(
    root: Path, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(4):
        truncate(root / f"train/a/{number:02}.png")
    loader = of_folder(root, batch_size=3, num_workers=num_workers, on_bad_image="skip").train_dataloader()
    for _ in range(2):
        caplog.clear()
        seen = [number for batch in numbers(loader) for number in batch]
        assert sorted(seen) == [0, 4, 5, 6, 7, 8, 9, 10]  # 0 is the one image of class b
        [line] = [record.getMessage() for record in caplog.records]
        assert line.startswith("[rank 0] skipped 4 unreadable image(s) of train: ")
        assert line.count(".png") == 3
        assert line.endswith(", ...")


def test_skipped_images_are_reported_when_the_last_batch_is_handed_out(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truncate(root / "val/a/04.png")
    loader = of_folder(root, batch_size=3, on_bad_image="skip").val_dataloader()
    batches = iter(loader)
    next(batches)
    assert caplog.records == []
    assert len(next(batches)[0]) == 1
    assert "skipped 1 unreadable image(s) of val" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_of_nothing_but_bad_images_is_empty(root: Path, num_workers: int) -> None:
    for path in (root / "val/a").iterdir():
        truncate(path)
    loader = of_folder(root, batch_size=3, num_workers=num_workers, on_bad_image="skip").val_dataloader()
    assert [(tuple(images.shape), tuple(labels.shape)) for images, labels in loader] == [((0, 3, 8, 8), (0,))] * 2


class Recorder(lightning.LightningModule):
    """Counts images per stage and trains nothing to speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[int]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen["train"].append(len(batch[0]))
        return self.weight * batch[0].sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["val"].append(len(batch[0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.seen["test"].append(len(batch[0]))

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        return len(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Writer(BasePredictionWriter):
    """Keeps the indices that lightning hands to writers of predictions."""

    def __init__(self) -> None:
        super().__init__("batch")
        self.indices: list[Any] = []

    def write_on_batch_end(self, *arguments: Any) -> None:
        self.indices.append(arguments[3])


def quiet_trainer(tmp_path: Path, **arguments: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **arguments,
    )


def test_lightning_runs_every_stage_on_the_loaders(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    truncate(root / "val/a/00.png")
    data, model, writer = of_folder(root, batch_size=4, on_bad_image="skip"), Recorder(), Writer()
    trainer = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, callbacks=[writer])
    with caplog.at_level(logging.WARNING, logger="snell_lightning"):
        trainer.fit(model, data)
    assert model.seen["train"] == [4, 4, 4] * 2
    assert model.seen["val"] == [3, 1] * 2
    assert caplog.text.count("skipped 1 unreadable") == 2
    trainer.test(model, data, verbose=False)
    assert model.seen["test"] == [3]
    assert trainer.predict(model, data) == [3]
    assert writer.indices == [[0, 1, 2]]


def test_lightning_leaves_both_samplers_in_place_for_several_processes(root: Path, tmp_path: Path) -> None:
    data = on_process(of_folder(root), 1, 2)
    trainer = quiet_trainer(tmp_path, strategy="ddp_spawn", devices=2)
    assert trainer._accelerator_connector.is_distributed
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert not trainer._data_connector._requires_distributed_sampler(loader)


def test_a_bad_image_surfaces_from_a_whole_fit_as_the_user_error(root: Path, tmp_path: Path) -> None:
    truncate(root / "train/a/07.png")
    with pytest.raises(UserError, match=r"^cannot read image .*07\.png: [^\n]*data.on_bad_image to skip$"):
        quiet_trainer(tmp_path, max_epochs=1).fit(Recorder(), of_folder(root, num_workers=2))


@pytest.mark.parametrize(
    ("device", "processors", "processes", "nodes", "expected"),
    [
        ("cpu", 16, 1, 1, 0),
        ("cuda", 16, 1, 1, 8),
        ("cuda", 16, 4, 1, 3),
        ("cuda", 16, 8, 2, 3),
        ("cuda", 2, 8, 1, 1),
    ],
)
def test_workers_are_the_processors_beside_a_process_that_trains_on_an_accelerator(
    device: str, processors: int, processes: int, nodes: int, expected: int, root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    for data, workers in ((of_folder(root), expected), (ImageDataModule(), 0), (of_folder(root, num_workers=5), 5)):
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            world_size=processes, num_nodes=nodes, strategy=SimpleNamespace(root_device=torch.device(device)),
            distributed_sampler_kwargs={"num_replicas": processes, "rank": 0},
        )  # fmt: skip
        loader = data.train_dataloader()
        assert (loader.num_workers, loader.persistent_workers) == (workers, workers > 0)
        assert loader.pin_memory == (device != "cpu")


def test_workers_live_through_epochs_and_give_what_no_workers_give(root: Path) -> None:
    alone, kept = (of_folder(root, batch_size=3, num_workers=workers) for workers in (0, 2))
    loaders = alone.train_dataloader(), kept.train_dataloader()
    seen = set()
    for epoch in range(3):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        if epoch == 1:
            # A pass that is left at its first batch leaves nothing to the next one.
            next(iter(loaders[1]))
        for one, other in zip(*loaders, strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
        seen.add(tuple(worker.pid for worker in loaders[1]._iterator._workers))
    assert len(seen) == 1
    iterator = loaders[1]._iterator  # which ends with the data module, and not with the last reference to it
    kept.teardown("fit")
    # On a machine that has other things to do, a process that was told to end takes its time.
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and (alive := [worker for worker in iterator._workers if _lives(worker)]):
        time.sleep(0.1)
    assert not alive


def _lives(worker: BaseProcess) -> bool:
    return worker.is_alive() and psutil.pid_exists(worker.pid)
