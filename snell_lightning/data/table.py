"""The `table` source: images and labels listed in a CSV, TSV or Parquet file.

    path,label,split
    cats/1.jpg,cat,train
    dogs/7.jpg,dog,test

A path is absolute, or begins at the table's folder. Without a column of splits, images are split by their paths as
those of a folder are; where it names no val, that is split off train.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.folder import split_named
from snell_lightning.data.splits import Sample, SplitName, Splits, as_splits, lacking

COLUMNS = {"path": "path", "label": "label", "split": "split"}
_DELIMITERS = {".csv": ",;", ".tsv": "\t", ".txt": ",;\t"}


def table(
    root: Path | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    fixed: Mapping[str, SplitName] | None = None,
    classes: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Splits:
    """Images that a table lists; classes are its sorted labels, by their value if all are whole numbers.

    Args:
        root: The table.
        val_fraction: Share that goes to val where no row is of val, in [0, 1).
        test_fraction: Share that goes to test where there is no column of splits, in [0, 1).
        seed: Seed of the split.
        fixed: Splits of single images by their path, as an earlier call settled them.
        classes: The model's classes, where they are known: some of them may be missing here.
        columns: Names of the columns `path`, `label` and `split`, where they are called otherwise.

    Raises:
        UserError: The table is missing, lacks a column or a value, names an image twice with different labels, or has
            fewer than two classes.
    """
    if root is None or not root.expanduser().is_file():
        where = "data.source table needs data.root" if root is None else f"there is no table {root}"
        raise UserError(f"{where}: the file of a table (.csv, .tsv or .parquet) with the columns path and label")
    file = root.expanduser()
    names = {**COLUMNS, **(columns or {})}
    if unknown := sorted(names.keys() - COLUMNS.keys()):
        raise UserError(f"data.columns has {unknown[0]!r}; it names the columns path, label and split")
    rows: dict[str, tuple[str, str]] = {}
    found = list(_rows(file, names, "split" in (columns or {})))
    for number, row in found:
        values = {key: "" if row.get(name) is None else str(row[name]).strip() for key, name in names.items()}
        place = f"{file}, row {number}"
        for key in ("path", "label"):
            if not values[key]:
                raise UserError(f"{place} has no {names[key]}")
        split: str = _split(values["split"], place) if names["split"] in row else ""
        known = rows.setdefault(values["path"], (values["label"], split))
        if known != (values["label"], split):
            now, then = (" ".join(filter(None, said)) for said in ((values["label"], split), known))
            raise UserError(f"{place}: {values['path']} is {now} here and {then} in an earlier row")
    again = len(found) - len(rows)
    notes = [f"{again:,} row(s) of {file.name} say again what others say"] if again else []
    labels = in_order({label for label, _ in rows.values()})
    if len(labels) < (2 if classes is None else 1):
        raise UserError(f"{file} has {len(labels)} class(es) in its column {names['label']!r}; at least two are needed")
    samples: dict[str, dict[str, Sample]] = {}
    for path, (label, split) in rows.items():
        samples.setdefault(split, {})[path] = (str(file.parent / path), labels.index(label))
    splits = as_splits(samples, tuple(labels), (val_fraction, test_fraction, seed), fixed)
    return replace(splits, notes=(*notes, *lacking(splits)), listed_in=file)


def _rows(file: Path, names: Mapping[str, str], needs_split: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row as a dictionary, and its number in the file."""
    needed = [names["path"], names["label"], *([names["split"]] if needs_split else [])]
    if file.suffix.lower() == ".parquet":
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise UserError("a Parquet table needs pyarrow: pip install 'snell_lightning[parquet]'") from error
        try:
            have = parquet.read_schema(file).names
            _require_columns(file, needed, have)
            wanted = [name for name in names.values() if name in have]
            yield from enumerate(parquet.read_table(file, columns=wanted).to_pylist(), 1)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{file} is no Parquet table: {str(error).splitlines()[0]}") from error
        return
    delimiters = _DELIMITERS.get(file.suffix.lower())
    if delimiters is None:
        raise UserError(f"{file} is no table that can be read; expected .csv, .tsv or .parquet")
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            first = text.readline()
            text.seek(0)
            reader = csv.DictReader(text, delimiter=max(delimiters, key=first.count))
            _require_columns(file, needed, reader.fieldnames or [])
            yield from ((reader.line_num, row) for row in reader)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not in UTF-8 (byte {error.start}); save it so") from error


def _require_columns(file: Path, needed: Sequence[str], have: Sequence[str]) -> None:
    if absent := [name for name in needed if name not in have]:
        raise UserError(
            f"{file} has no column {absent[0]!r} but {', '.join(map(repr, have)) or 'none'}; name its columns as in "
            "--data.columns '{path: image, label: class, split: part}'"
        )


def _split(value: str, place: str) -> SplitName:
    if (split := split_named(value)) is None:
        raise UserError(f"{place} has the split {value!r}; expected train, val or test")
    return split


def in_order(labels: set[str]) -> list[str]:
    """Labels in order; as numbers where all of them are."""
    whole = all(label.removeprefix("-").isdigit() for label in labels)
    return sorted(labels, key=lambda label: (int(label), label)) if whole else sorted(labels)
