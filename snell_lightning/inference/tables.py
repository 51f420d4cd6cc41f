"""Files that predictions are written to: CSV, JSON lines or Parquet, as the name's ending says.

A table is written in parts, each whole or not there at all, which are then put together in order. Values of one image:

| format     | predictions                                                             | embeddings            |
|------------|-------------------------------------------------------------------------|-----------------------|
| CSV        | `image, class, probability, class_2, probability_2, ..., error`         | `image, feature_1, ...` |
| JSON lines | `image, classes, probabilities`, or `image, error`                      | `image, embedding`    |
| Parquet    | `image, classes, probabilities, error`                                  | `image, embedding, error` |

Where several adapters predict, `adapter` comes after `image`.
"""

import csv
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snell_lightning.adapters.errors import UserError

_ROWS = 65536  # rows that are put together at once, and of a Parquet row group


@dataclass(frozen=True)
class Row:
    """What is known of one image.

    Attributes:
        image: Its path.
        adapter: The adapter's path, where there are several; else empty.
        labels: The most probable classes; empty for embeddings and for an image that could not be read.
        values: Their probabilities, or the features.
        error: Why it could not be read, or empty.
    """

    image: str
    adapter: str
    labels: tuple[str, ...]
    values: tuple[float, ...]
    error: str


@dataclass(frozen=True)
class Columns:
    """What a table's rows have.

    Attributes:
        values: How many classes or features.
        embeddings: Whether they are features.
        several: Whether there are several adapters.
    """

    values: int
    embeddings: bool
    several: bool

    @property
    def names(self) -> list[str]:
        """Of a table in which every value has a column of its own."""
        numbers = range(1, self.values + 1)
        if self.embeddings:
            values = [f"feature_{number}" for number in numbers]
        else:
            endings = ["" if number == 1 else f"_{number}" for number in numbers]
            values = [f"{name}{ending}" for ending in endings for name in ("class", "probability")]
        return ["image", *(["adapter"] if self.several else []), *values, "error"]


class CsvTable:
    """Comma-separated values with a header; file names need not be UTF-8, and are written as they are."""

    def write(self, path: Path, columns: Columns, rows: Iterable[Row]) -> None:
        """Write a part, which has no header."""
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(self._cells(columns, row) for row in rows)

    def join(self, target: Path, before: Path | None, parts: Sequence[Path], columns: Columns) -> None:
        """Write a whole table from one that is there and parts that follow it."""
        with target.open("wb") as file:
            if before is None:
                file.write((",".join(columns.names) + "\r\n").encode())
            _append(file, [*([before] if before else []), *parts])

    def keys(self, path: Path, columns: Columns) -> Iterator[tuple[str, str]]:
        """Image and adapter of each row of a whole table.

        Raises:
            UserError: Its columns are others.
        """
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if header != columns.names:
                raise UserError(f"{path} has other columns ({', '.join(header[:4])}, ...); name another output")
            for row in rows:
                yield row[0], row[1] if columns.several else ""

    @staticmethod
    def _cells(columns: Columns, row: Row) -> list[str]:
        if columns.embeddings:
            values = [f"{value:.6g}" for value in row.values]
        else:
            pairs = zip(row.labels, row.values, strict=True)
            values = [text for label, value in pairs for text in (label, f"{value:.6f}")]
        width = columns.values * (1 if columns.embeddings else 2)
        values += [""] * (width - len(values))
        return [row.image, *([row.adapter] if columns.several else []), *values, row.error]


class JsonTable:
    """One JSON object a line."""

    def write(self, path: Path, columns: Columns, rows: Iterable[Row]) -> None:
        """Write a part."""
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(self._object(columns, row)) + "\n")

    def join(self, target: Path, before: Path | None, parts: Sequence[Path], columns: Columns) -> None:
        """Write a whole table from one that is there and parts that follow it."""
        with target.open("wb") as file:
            _append(file, [*([before] if before else []), *parts])

    def keys(self, path: Path, columns: Columns) -> Iterator[tuple[str, str]]:
        """Image and adapter of each row of a whole table.

        Raises:
            UserError: A line is none of its rows.
        """
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    yield row["image"], row["adapter"] if columns.several else ""
                except (ValueError, KeyError, TypeError) as error:
                    raise UserError(f"{path}, line {number}, is no prediction; name another output") from error

    @staticmethod
    def _object(columns: Columns, row: Row) -> dict[str, Any]:
        named: dict[str, Any] = {"image": row.image} | ({"adapter": row.adapter} if columns.several else {})
        if row.error:
            return {**named, "error": row.error}
        values = [float(f"{value:.6g}") for value in row.values]
        return {**named, **({"embedding": values} if columns.embeddings else _both(row.labels, values))}


class ParquetTable:
    """Apache Parquet, of the package pyarrow."""

    def write(self, path: Path, columns: Columns, rows: Iterable[Row]) -> None:
        """Write a part, itself a whole table."""
        import pyarrow.parquet

        rows = list(rows)
        cells: dict[str, list[Any]] = {"image": [_utf8(row.image) for row in rows]}
        if columns.several:
            cells["adapter"] = [_utf8(row.adapter) for row in rows]
        values = [None if row.error else list(row.values) for row in rows]
        if columns.embeddings:
            cells["embedding"] = values
        else:
            cells |= _both([None if row.error else list(row.labels) for row in rows], values)
        cells["error"] = [row.error or None for row in rows]
        pyarrow.parquet.write_table(pyarrow.table(cells, self._schema(columns)), path)

    def join(self, target: Path, before: Path | None, parts: Sequence[Path], columns: Columns) -> None:
        """Write a whole table from one that is there and parts that follow it."""
        import pyarrow
        from pyarrow import parquet

        schema = self._schema(columns)
        waiting: list[Any] = []
        with parquet.ParquetWriter(target, schema) as writer:
            for part in [*([before] if before else []), *parts]:
                for batch in parquet.ParquetFile(part).iter_batches(_ROWS):
                    waiting.append(batch)
                    if sum(map(len, waiting)) >= _ROWS:
                        writer.write_table(pyarrow.Table.from_batches(waiting, schema).combine_chunks())
                        waiting = []
            if waiting:
                writer.write_table(pyarrow.Table.from_batches(waiting, schema).combine_chunks())

    def keys(self, path: Path, columns: Columns) -> Iterator[tuple[str, str]]:
        """Image and adapter of each row of a whole table.

        Raises:
            UserError: Its columns are others.
        """
        from pyarrow import ArrowInvalid, parquet

        try:
            file = parquet.ParquetFile(path)
        except ArrowInvalid as error:
            raise UserError(f"{path} is not a Parquet file; name another output") from error
        if not file.schema_arrow.equals(self._schema(columns)):
            raise UserError(f"{path} has other columns ({', '.join(file.schema_arrow.names)}); name another output")
        for batch in file.iter_batches(_ROWS, columns=["image", *(["adapter"] if columns.several else [])]):
            rows = batch.to_pydict()
            yield from zip(rows["image"], rows.get("adapter", [""] * len(batch)), strict=True)

    @staticmethod
    def _schema(columns: Columns) -> Any:
        import pyarrow

        text, numbers = pyarrow.string(), pyarrow.list_(pyarrow.float32())
        values: dict[str, Any] = {"embedding": numbers} if columns.embeddings else _both(pyarrow.list_(text), numbers)
        several = {"adapter": text} if columns.several else {}
        return pyarrow.schema({"image": text, **several, **values, "error": text}.items())


Table = CsvTable | JsonTable | ParquetTable
_TABLES: dict[str, type[Table]] = {".csv": CsvTable, ".jsonl": JsonTable, ".parquet": ParquetTable}


def table_for(path: Path) -> Table:
    """The format that a file's name stands for.

    Raises:
        UserError: It stands for none, or its package is missing.
    """
    kind = _TABLES.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"--output {path} ends in {path.suffix or 'nothing'}; expected {', '.join(_TABLES)}")
    if kind is ParquetTable:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise UserError("Parquet needs pyarrow: pip install 'snell_lightning[parquet]'") from error
    return kind()


def as_key(table: Table, image: str) -> str:
    """A path as the table gives it back."""
    return _utf8(image) if isinstance(table, ParquetTable) else image


def _both(labels: Any, probabilities: Any) -> dict[str, Any]:
    return {"classes": labels, "probabilities": probabilities}


def _utf8(text: str) -> str:
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _append(file: Any, sources: Iterable[Path]) -> None:
    for source in sources:
        with source.open("rb") as part:
            shutil.copyfileobj(part, file, 1 << 20)
