"""Files that are there as a whole or not at all, whenever a process is killed and a disk is full."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_PART = ".part"


def user_cache() -> Path:
    """The folder of what is kept for this user between runs; made for nobody else.

    Raises:
        OSError: It cannot be made.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snell_lightning"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def whole(path: str | Path, previous: str | Path | None = None) -> Iterator[Path]:
    """Write a file under another name beside it, which it gets once it is written and safe on the disk.

    A file that is there already stays as it is until then, and for good if an error is raised within.

    Args:
        path: The file; its folder is made.
        previous: Where a file that is there already goes; without it, it is replaced.

    Yields:
        Where to write.

    Raises:
        OSError: It cannot be written; the error names the file.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}{_PART}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        _sync(part, os.O_RDWR)
        if previous is not None and path.is_file():
            os.replace(path, previous)
        os.replace(part, path)
        if os.name == "posix":
            _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        # Where writing fails, Python does not say to which file; nor is it the other name that a user knows.
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def remove_parts(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder that is nobody else's now."""
    for part in folder.glob(f".*{_PART}"):
        part.unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
