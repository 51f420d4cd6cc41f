"""Predictions that are made in parts, so that a process that ends at any moment loses none and doubles none.

    predictions.csv                whole, or not there
    predictions.csv.json           what it was made with: a later call goes on with it, or is refused
    .predictions.csv.lock          while a process writes it; the system lets go of the lock when that ends in any way
    .predictions.csv.parts/        while there is something left to do
        plan.json                  the same, the images, and how large the file was before
        000000-2.csv ...           the rows of 256 images or so, of which 2 could not be read; written aside and renamed

A part that is there is done. When all are, the file is written anew with them at its end and replaced in one step, and
the folder goes. Whether that has happened already is seen by the file's size.
"""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from snell_lightning.adapters.errors import UserError
from snell_lightning.adapters.whole import whole
from snell_lightning.inference.tables import Columns, Row, Table
from snell_lightning.runs import lock

_PLAN = "plan.json"


class Parts:
    """What is left to predict for an output, and what is done of it.

    Args:
        output: The file.
        table: Its format.
        columns: Its columns.
        settings: What it is made with, in values that JSON can hold.
    """

    def __init__(self, output: Path, table: Table, columns: Columns, settings: dict[str, Any]) -> None:
        self.output, self.table, self.columns, self.settings = output, table, columns, settings
        self.folder = output.with_name(f".{output.name}.parts")
        self.facts = output.with_name(f"{output.name}.json")
        self.tasks: list[tuple[int, str]] = []
        self.bounds: list[tuple[int, int]] = []
        self._before: int | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within, no other process writes this output.

        Raises:
            UserError: One does.
        """
        mark = self.output.with_name(f".{self.output.name}.lock")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with mark.open("a", encoding="utf-8") as file:
            if not lock(file):
                raise UserError(f"another process is writing {self.output}; wait for it, or name another output")
            try:
                yield
            finally:
                mark.unlink(missing_ok=True)

    def resume(self) -> bool:
        """Take up what an earlier process left unfinished; False where there is nothing of the kind.

        Raises:
            UserError: It was made with other settings.
        """
        if not (self.folder / _PLAN).is_file():
            return False
        plan = json.loads((self.folder / _PLAN).read_text(encoding="utf-8"))
        self._require_same(plan["settings"], self.folder)
        self.tasks = [(adapter, image) for adapter, image in plan["tasks"]]
        self.bounds, self._before = [(start, stop) for start, stop in plan["bounds"]], plan["before"]
        return True

    def done_before(self) -> set[tuple[str, str]]:
        """Image and adapter of each row that the output has.

        Raises:
            UserError: The output was made with other settings, or by something else.
        """
        if not self.output.exists():
            return set()
        if not self.facts.is_file():
            raise UserError(
                f"{self.output} exists, and {self.facts.name} is not beside it to say how it was made; "
                "name another output"
            )
        self._require_same(json.loads(self.facts.read_text(encoding="utf-8"))["settings"], self.output)
        return set(self.table.keys(self.output, self.columns))

    def begin(self, tasks: Sequence[tuple[int, str]], size: int) -> None:
        """Plan the parts: at most `size` tasks in each, and all of the same adapter.

        Args:
            tasks: Number of the adapter, and image; those of an adapter together.
            size: Tasks of a part.
        """
        self.tasks, self.bounds = list(tasks), []
        for _, group in itertools.groupby(range(len(tasks)), key=lambda place: tasks[place][0]):
            places = list(group)
            starts = range(places[0], places[-1] + 1, size)
            self.bounds += [(start, min(start + size, places[-1] + 1)) for start in starts]
        self._before = self.output.stat().st_size if self.output.exists() else None
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        plan = {"settings": self.settings, "before": self._before, "bounds": self.bounds, "tasks": self.tasks}
        _write_whole(self.folder / _PLAN, json.dumps(plan))

    @property
    def missing(self) -> list[int]:
        """Numbers of the parts that are not done."""
        done = self._done()
        return [number for number in range(len(self.bounds)) if number not in done]

    @property
    def is_first(self) -> bool:
        """Whether there was no output before."""
        return self._before is None

    @property
    def unreadable(self) -> int:
        """Images of the parts that are done which could not be read."""
        return sum(int(path.stem.partition("-")[2]) for path in self._done().values())

    def images(self, part: int) -> list[str]:
        """The images of a part."""
        start, stop = self.bounds[part]
        return [image for _, image in self.tasks[start:stop]]

    def adapter(self, part: int) -> int:
        """The number of its adapter."""
        return self.tasks[self.bounds[part][0]][0]

    def write(self, part: int, rows: Sequence[Row]) -> None:
        """Write a part."""
        path = self.folder / f"{part:06}-{sum(bool(row.error) for row in rows)}{self.output.suffix}"
        with whole(path) as unfinished:
            self.table.write(unfinished, self.columns, rows)

    def join(self) -> None:
        """Put all parts at the output's end, in order, and drop them.

        Raises:
            UserError: The output that they belong to is gone.
        """
        now = self.output.stat().st_size if self.output.exists() else None
        if now is None and self._before is not None:
            raise UserError(
                f"{self.output} was there when {self.folder} was begun, and is gone; put it back, or delete "
                "that folder to begin anew"
            )
        if now == self._before:
            done = self._done()
            parts = [done[number] for number in sorted(done)]
            joined = self.folder / f"joined{self.output.suffix}"
            self.table.join(joined, None if now is None else self.output, parts, self.columns)
            os.replace(joined, self.output)
        _write_whole(self.facts, json.dumps({"settings": self.settings}, indent=1) + "\n")
        shutil.rmtree(self.folder)

    def drop(self) -> None:
        """Forget what was done."""
        shutil.rmtree(self.folder)

    def _done(self) -> dict[int, Path]:
        """Parts by their number."""
        found = self.folder.glob(f"*-*{self.output.suffix}")
        return {int(path.stem.partition("-")[0]): path for path in found}

    def _require_same(self, made_with: dict[str, Any], what: Path) -> None:
        for key, value in self.settings.items():
            if made_with.get(key) != value:
                raise UserError(
                    f"{what} was made with {key} {_short(made_with.get(key))}, and now it is {_short(value)}; name "
                    f"another output, or delete {what}"
                )


def _short(value: Any) -> str:
    return str(value) if len(str(value)) < 200 else f"{str(value)[:200]}..."


def _write_whole(path: Path, text: str) -> None:
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
