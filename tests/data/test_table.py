"""The table source: CSV, TSV and Parquet, splits, column names, and a line for every mistake."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from snell_lightning.adapters.errors import UserError
from snell_lightning.data import ImageDataModule
from snell_lightning.data.folder import folder
from snell_lightning.data.splits import Sample, Splits
from snell_lightning.data.table import table

MakeImages = Callable[[Mapping[str, int]], Path]


def read(file: Path | None, val: float = 0.25, test: float = 0.25, **settings: Any) -> Splits:
    return table(file, val, test, 0, **settings)


def write(root: Path, text: str, name: str = "images.csv") -> Path:
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def pairs(splits: Splits, part: str, root: Path) -> list[tuple[str, str]]:
    samples: list[Sample] = getattr(splits, part)
    return [(os.path.relpath(path, root), splits.classes[label]) for path, label in samples]


@pytest.fixture
def root(make_images: MakeImages) -> Path:
    return make_images({"a": 20, "b": 20})


def rows(root: Path) -> list[tuple[str, str]]:
    return [(str(path.relative_to(root)), path.parent.name) for path in sorted(root.rglob("*.png"))]


def test_without_splits_it_is_split_as_a_folder_with_the_same_images_is(root: Path) -> None:
    file = write(root, "\n".join(["path,label", *(",".join(row) for row in rows(root))]))

    found, expected = read(file), folder(root, 0.25, 0.25, 0)

    for part in ("train", "val", "test"):
        assert sorted(pairs(found, part, root)) == sorted(pairs(expected, part, root))
    assert (found.classes, found.by_fractions, found.fixed) == (expected.classes, True, expected.fixed)
    assert found.open_image(found.train[0][0]).mode == "RGB"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_splits_and_other_names_of_columns(root: Path, delimiter: str, start: str) -> None:
    lines = [["id", "image", "species", "part"]]
    for number, (path, label) in enumerate(rows(root)):
        lines.append([str(number), path, label, ("training", "Valid", "test")[number % 3]])
    text = start + "\n".join(delimiter.join(line) for line in lines)
    file = write(root, text, "images.tsv" if delimiter == "\t" else "images.csv")

    splits = read(file, columns={"path": "image", "label": "species", "split": "part"})

    assert pairs(splits, "val", root) == [row for number, row in enumerate(rows(root)) if number % 3 == 1]
    assert len(splits.train) + len(splits.val) + len(splits.test) == 40
    assert not splits.by_fractions


def test_a_parquet_table(root: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    content = {
        "path": [path for path, _ in rows(root)],
        "label": [10 if label == "a" else 9 for _, label in rows(root)],
    }
    parquet.write_table(pyarrow.table({**content, "unused": [{"x": 1}] * 40}), root / "images.parquet")

    splits = read(root / "images.parquet")

    # As numbers, not as words.
    assert splits.classes == ("9", "10")
    assert {label for path, label in splits.train if "/a/" in path} == {1}


def test_where_no_row_is_of_val_it_is_split_off_train(root: Path) -> None:
    text = "\n".join(["path,label,split", *(f"{path},{label},train" for path, label in rows(root))])

    splits = read(write(root, text))

    assert splits.by_fractions
    assert len(splits.val) > 0
    assert splits.test == []


def test_an_absolute_path_and_a_row_that_says_nothing_new(root: Path) -> None:
    text = "\n".join(["path,label", *(f"{root / path},{label}" for path, label in rows(root)), f"{root}/a/00.png,a"])

    splits = read(write(root, text))

    assert sum(len(part) for part in (splits.train, splits.val, splits.test)) == 40
    assert splits.notes == ("1 row(s) of images.csv say again what others say",)


def test_it_feeds_the_data_module(root: Path) -> None:
    file = write(root, "\n".join(["file,label", *(",".join(row) for row in rows(root))]))

    data = ImageDataModule("table", str(file), columns={"path": "file"}, image_size=8, batch_size=4)

    images, labels, *_ = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 8, 8)
    assert set(labels.tolist()) <= {0, 1}
    with pytest.raises(UserError, match=r"data.columns is for data.source table or datasets, not folder"):
        ImageDataModule("folder", str(root), columns={"path": "file"})


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("image,label\na/00.png,a\n", {}, r"has no column 'path' but 'image', 'label'; name its columns as in"),
        ("", {}, r"has no column 'path' but none"),
        ("path,label\na/00.png,a\n", {"columns": {"split": "part"}}, "has no column 'part'"),
        ("path,label\na/00.png,a\n", {"columns": {"image": "path"}}, "data.columns has 'image'; it names"),
        ("path,label\na/00.png,a\nb/00.png,\n", {}, "row 3 has no label"),
        ("path,label\na/00.png\n", {}, "row 2 has no label"),
        ("path,label\na/00.png,a\na/01.png,a\n", {}, r"has 1 class\(es\) in its column 'label'; at least two"),
        (
            "path,label,split\na/00.png,a,train\nb/00.png,b,train\nb/99.png,b,val\n",
            {},
            r"1 of the 1 val images listed in .* are not there, such as .*b/99.png; check-data names them all",
        ),
        ("path,label\na/00.png,a\na/00.png,b\n", {}, "row 3: a/00.png is b here and a in an earlier row"),
        ("path,label,split\na/00.png,a,train\na/00.png,a,test\n", {}, "a/00.png is a test here and a train in"),
        ("path,label,split\na/00.png,a,train\nb/00.png,b,later\n", {}, "has the split 'later'; expected train, val"),
        ("path,label,split\na/00.png,a,train\nb/00.png,b,\n", {}, "has the split ''"),
    ],
)
def test_each_mistake_is_one_line(root: Path, text: str, settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(write(root, text), **settings).require_files()
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_table_is_one_line(root: Path) -> None:
    with pytest.raises(UserError, match=r"needs data.root: the file of a table"):
        read(None)
    with pytest.raises(UserError, match=r"there is no table .*nothing.csv: the file of a table"):
        read(root / "nothing.csv")
    with pytest.raises(UserError, match=r"is no table that can be read; expected .csv, .tsv or .parquet"):
        read(root / "a" / "00.png")
    (root / "latin.csv").write_bytes("path,label\nä.png,a\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not in UTF-8"):
        read(root / "latin.csv")
    (root / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="is no Parquet table"):
        read(root / "broken.parquet")
