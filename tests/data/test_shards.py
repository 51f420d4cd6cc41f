"""Images in tar files, as WebDataset lays them out: read from their places, shuffled a few files at a time."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from snell_lightning import UserError
from snell_lightning.data import ImageDataModule, shards
from snell_lightning.data.check import check
from snell_lightning.data.samplers import TrainSampler
from snell_lightning.data.shards import webdataset


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (number % 256, 7, 9)).save(file, "PNG")
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write(path: Path, numbers: range, label: Callable[[int], str] = lambda number: str(number % 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            add(archive, f"{number:06}.png", picture(number))
            if number % 2:
                add(archive, f"{number:06}.json", json.dumps({"label": label(number), "caption": "one"}).encode())
            else:
                add(archive, f"{number:06}.cls", label(number).encode())
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for shard in range(20):
        write(tmp_path / "set" / f"train-{shard:06}.tar", range(10 * shard, 10 * shard + 10))
    write(tmp_path / "set" / "val-000000.tar", range(200, 212))
    write(tmp_path / "set" / "test-000000.tar", range(220, 229))
    return tmp_path / "set"


def read(root: Path | None) -> Any:
    return webdataset(root, 0.2, 0.2, 0)


def test_shards_are_read_in_their_own_splits(root: Path, cache: Path) -> None:
    splits = read(root)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (200, 12, 9)
    assert splits.classes == ("0", "1", "2")
    for number in (0, 57, 199):
        source, label = splits.train[number]
        assert label == number % 3
        assert splits.open_image(source).getpixel((3, 3)) == (number, 7, 9)
    assert splits.open_image.name(splits.train[57][0]) == f"{root}/train-000005.tar/000057"
    again = pickle.loads(pickle.dumps(splits.open_image))
    assert again(splits.test[0][0]).getpixel((0, 0)) == (220, 7, 9)
    assert len(list((cache / "snell_lightning" / "shards").glob("*.npz"))) == 22


def test_headers_are_read_once_and_again_where_a_file_has_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(root)
    opened = []
    real = shards._read_index

    def count(path: Path) -> Any:
        opened.append(path.name)
        return real(path)

    monkeypatch.setattr(shards, "_read_index", count)
    assert read(root).train == before.train
    assert opened == []
    write(root / "val-000000.tar", range(300, 320))
    assert len(read(root).val) == 20
    assert opened == ["val-000000.tar"]


def test_folders_name_splits_and_without_any_images_are_split_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a" / "training" / "0.tar", range(30))
    write(tmp_path / "a" / "valid" / "0.tar", range(30, 36))
    splits = read(tmp_path / "a")
    assert (len(splits.train), len(splits.val), len(splits.test)) == (30, 6, 0)
    for shard in range(2):
        write(tmp_path / "b" / f"{shard}.tar", range(60 * shard, 60 * shard + 60), lambda number: "ab"[number % 2])
    splits = read(tmp_path / "b")
    assert splits.classes == ("a", "b")
    assert splits.by_fractions
    assert len(splits.train) + len(splits.val) + len(splits.test) == 120
    assert min(len(splits.val), len(splits.test)) > 5


def test_it_feeds_the_data_module_the_same_with_and_without_workers(root: Path) -> None:
    batches = []
    for workers in (0, 2):
        data = ImageDataModule(
            "webdataset", str(root), image_size=8, augmentation="light", batch_size=16, num_workers=workers
        )
        batches.append(list(data.train_dataloader()))
        data.teardown("fit")
    assert sum(len(labels) for _, labels in batches[0]) == 200
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert check(data.splits, 8, workers=0).looked_at == 221


def test_training_goes_through_a_few_shards_at_a_time_in_another_order_each_epoch(root: Path) -> None:
    data = ImageDataModule("webdataset", str(root), image_size=8)
    sampler = data.train_dataloader().sampler
    assert isinstance(sampler, TrainSampler)
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = [number - 200 * epoch for number in sampler]
        assert sorted(order) == list(range(200))
        # The first 160 images are those of 16 shards, in no shard's order.
        assert len({index // 10 for index in order[:160]}) == 16
        assert len({index // 10 for index in order[:16]}) > 5
        orders.append(order)
    assert orders[0] != orders[1]


def test_processes_share_the_images_and_a_run_goes_on_where_it_was() -> None:
    def sampler(processes: int, rank: int, done: int = 0) -> list[int]:
        made = TrainSampler(range(47), processes, rank, 5, [10, 10, 10, 10, 7])
        made.done = done
        return list(made)

    whole = sampler(1, 0)
    assert [number for pair in zip(*(sampler(2, rank) for rank in range(2)), strict=True) for number in pair][
        :47
    ] == whole
    assert sampler(1, 0, done=20) == whole[20:]


def without_a_class(root: Path) -> None:
    with tarfile.open(root / "val-000000.tar", "w") as archive:
        add(archive, "1.png", picture(1))
        add(archive, "1.cls", b"1")
        add(archive, "2.png", picture(2))


def without_a_name_for_it(root: Path) -> None:
    with tarfile.open(root / "val-000000.tar", "w") as archive:
        add(archive, "1.png", picture(1))
        add(archive, "1.json", b"[1]")


def compressed(root: Path) -> None:
    with tarfile.open(root / "val-000000.tar", "w:gz") as archive:
        add(archive, "1.png", picture(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_class, r"1 of the 2 images in .*val-000000.tar have no class, such as 2"),
        (without_a_name_for_it, r"1 of the 1 images in .*val-000000.tar have no class, such as 1"),
        (compressed, r"val-000000.tar is not a whole, uncompressed tar file"),
        (lambda root: (root / "val-000000.tar").write_bytes(b"no tar" * 999), r"is not a whole, uncompressed tar file"),
        (lambda root: write(root / "val-000000.tar", range(0)), r"val-000000.tar holds no image; expected ROOT/train"),
        (lambda root: write(root / "more.tar", range(9)), r"more.tar is of no split, and others are"),
    ],
)
def test_each_mistake_is_one_line(root: Path, change: Callable[[Path], None], message: str) -> None:
    change(root)
    with pytest.raises(UserError, match=message) as caught:
        read(root)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_root_shows_the_layout(tmp_path: Path) -> None:
    for folder, message in (
        (None, "needs data.root"),
        (tmp_path / "none", "no folder"),
        (tmp_path, "has no tar files"),
    ):
        with pytest.raises(UserError, match=rf"{message}.*; expected ROOT/train-NUMBER.tar"):
            read(folder)


def test_a_shard_that_was_cut_off_is_no_whole_one(root: Path) -> None:
    path = root / "train-000003.tar"
    path.write_bytes(path.read_bytes()[:1300])
    with pytest.raises(UserError, match=r"train-000003\.tar"):
        read(root)
