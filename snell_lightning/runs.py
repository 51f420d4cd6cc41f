"""A run's folder: made so that no other run has it, marked while the run is not finished, and found again.

    ROOT/version_N      a training run        ROOT/test_N, ROOT/validate_N, ROOT/predict_N   an evaluation
        config.yaml     the resolved config; config_1.yaml is that of the run when it was first continued
        adapter.safetensors, checkpoints/, metrics.csv, and what a logger writes
        .unfinished     the mark: while it is there, the run can be continued

The folder is the run's whatever its loggers are. A process that trains holds a lock on the mark, which the system
releases when the process ends, however it ends; a run that finished takes its mark away.
"""

import contextlib
import errno
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from snell_lightning.adapters.errors import UserError
from snell_lightning.adapters.whole import remove_parts

try:
    import fcntl
except ImportError:  # Windows: there, a run that is going on cannot be told from one that was killed.
    fcntl = None  # type: ignore[assignment]

ADAPTER = "adapter.safetensors"
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_MARK = ".unfinished"
_MARK_SIZE = 4096
_ROOT = "runs"
# The first line of a config that a run saved.
_SAVED = "# lightning.pytorch=="


def claim(root: Path, name: str) -> Path:
    """Make a folder below `root` that nobody else has or makes.

    Args:
        root: Where runs go; made if need be.
        name: Its name, and then that with `_1`, `_2`, ...; with a `*` in it, the first free number in its place.

    Raises:
        OSError: It cannot be made.
    """
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        numbered = name.replace("*", str(number)) if "*" in name else f"{name}_{number}" if number else name
        try:
            (root / numbered).mkdir()
            return root / numbered
        except FileExistsError:
            number += 1


def root_of(trainer: Mapping[str, Any]) -> Path:
    """Where the runs of a trainer's settings go: `default_root_dir`, or our logger's `save_dir`, or `runs`."""
    logger = trainer.get("logger")
    settings: Mapping[str, Any] = {}
    if isinstance(logger, Mapping) and str(logger.get("class_path", "RunLogger")).endswith("RunLogger"):
        settings = logger.get("init_args", logger)
    root = trainer.get("default_root_dir") or settings.get("save_dir") or _ROOT
    return Path(root).expanduser().absolute() / str(settings.get("name") or "")


@dataclass
class Run:
    """A run that is going on.

    Args:
        root: Where runs go.
        name: The folder's name, as `claim` takes it.
        facts: What to know it again by, as JSON can hold it.
        folder: The folder; None until the run starts. One that is given is continued in.
    """

    root: Path
    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    _mark: IO[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # Whether it goes on in the folder of a run that was stopped.
        self.continues = self.folder is not None
        self._noted = str(self.root)

    def start(self, can_be_continued: bool) -> Path:
        """Take the folder.

        Args:
            can_be_continued: Whether to mark it as unfinished until `finish`.

        Raises:
            UserError: The run that is to be continued is going on.
        """
        if self.folder is None:
            self.folder = claim(self.root, self.name)
        if can_be_continued:
            # Not truncated before it is locked, and opened once: to close a second handle would release the lock.
            (self.folder / _MARK).touch()
            self._mark = (self.folder / _MARK).open("r+", encoding="utf-8")
            if not lock(self._mark):
                raise UserError(f"the run in {self.folder} is going on already")
            for each in (self.folder, self.folder / CHECKPOINTS):
                remove_parts(each)
            self.note(self.folder / CHECKPOINTS)
        return self.folder

    def note(self, checkpoints: str | Path) -> None:
        """Write into the mark in which folder the run's checkpoints are."""
        self._noted = str(Path(checkpoints).absolute())
        if self._mark is not None:
            # Over what is there, and of its size: a process that is killed here leaves the one or the other.
            self._mark.seek(0)
            self._mark.write(json.dumps({**self.facts, "checkpoints": self._noted}).ljust(_MARK_SIZE))
            self._mark.truncate()

    def checkpoints(self) -> set[Path]:
        """What the run can be continued from."""
        return _checkpoints(self.folder, {"checkpoints": self._noted}) if self.folder is not None else set()

    def finish(self) -> None:
        """There is nothing left to do."""
        if self._mark is not None:
            Path(self._mark.name).unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """The run is over, finished or not; one that has left no checkpoint cannot be continued."""
        if self._mark is not None:
            if not self.checkpoints():
                with contextlib.suppress(OSError):
                    Path(self._mark.name).unlink(missing_ok=True)
            self._mark.close()
            self._mark = None


def unfinished(root: Path, is_whole: Callable[[Path], bool], **facts: Any) -> tuple[Path, Path] | None:
    """The run to continue: its folder and its newest whole checkpoint; None where there is none.

    Of several runs below `root` it is the one with the newest checkpoint. Runs that are going on are left alone.

    Args:
        root: Where runs go.
        is_whole: Whether a checkpoint can be read.
        **facts: What the run must have been started with.
    """
    found: list[tuple[float, Path, Path]] = []
    for mark in (*root.glob(f"*/{_MARK}"), *root.glob(f"*/*/{_MARK}")):
        known = _read(mark)
        if known is not None and all(known.get(name) == value for name, value in facts.items()):
            found += [(path.stat().st_mtime, path, mark.parent) for path in _checkpoints(mark.parent, known)]
    for _, path, folder in sorted(found, reverse=True):
        if is_whole(path):
            return folder, path
    return None


def continuable(folder: Path, is_whole: Callable[[Path], bool]) -> Path:
    """The newest whole checkpoint of the run in a folder.

    Raises:
        UserError: It finished, is going on, or has left no checkpoint.
    """
    if not (folder / _MARK).is_file():
        raise UserError(
            f"there is no unfinished run in {folder}; to go on from a checkpoint in a new run, name it with --ckpt_path"
        )
    known = _read(folder / _MARK)
    if known is None:
        raise UserError(f"the run in {folder} is still going on")
    paths = sorted(_checkpoints(folder, known), key=lambda path: path.stat().st_mtime, reverse=True)
    whole = next((path for path in paths if is_whole(path)), None)
    if whole is None:
        raise UserError(f"the run in {folder} has left no whole checkpoint; start it anew")
    return whole


def own_adapter(config: str) -> str | None:
    """The adapter beside the config that a run saved in its folder; None where the config is no run's.

    Raises:
        UserError: It is a run's, and the run left no adapter.
    """
    path = Path(config)
    adapter = path.with_name(ADAPTER)
    with path.open(encoding="utf-8") as file:
        saved = path.name == CONFIG and (adapter.is_file() or file.readline().startswith(_SAVED))
    if not saved:
        return None
    if not adapter.is_file():
        last = path.parent / CHECKPOINTS / LAST
        hint = f"--ckpt_path {last}" if last.is_file() else "--model.adapter_file FILE or --ckpt_path FILE"
        raise UserError(f"the run in {path.parent} has no {ADAPTER}; name what is to be used with {hint}")
    return str(adapter)


def short(path: str | Path) -> str:
    """A path relative to the current folder where it lies below it."""
    absolute = Path(path).resolve()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute)


def _checkpoints(folder: Path, known: Mapping[str, Any]) -> set[Path]:
    """A run's checkpoints. Those of a run that was moved lie below its folder, whatever it noted."""
    folders = {folder, folder / CHECKPOINTS, Path(known.get("checkpoints", folder))}
    return {path.resolve() for each in folders for path in each.glob("*.ckpt")}


def _read(mark: Path) -> dict[str, Any] | None:
    """What a mark says; None while the run is going on."""
    try:
        with mark.open("r+", encoding="utf-8") as file:
            if not lock(file):
                return None
            text = file.read()
        return dict(json.loads(text or "{}"))
    except (OSError, ValueError):
        return {}


def lock(file: IO[str]) -> bool:
    """Take the lock on a file, whose owner is the process and not its children; whether nobody else has it."""
    if fcntl is not None:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Another process has it, or the file system knows no locks.
            return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
