"""Checkpoint files with a seal: a SHA-256 of all that comes before it, which shows every damage.

torch's files are zip archives, whose sums torch does not look at when it reads: a bit that has flipped on the disk ends
up in a weight. The seal is the archive's comment, so that `torch.load` reads the file as it reads any other.
"""

import hashlib
import io
import struct
from pathlib import Path
from typing import Any

import torch

from snell_lightning.adapters.errors import UserError
from snell_lightning.adapters.whole import whole

_NAME = b"sha256:"
_SEAL = len(_NAME) + hashlib.sha256().digest_size * 2


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path, previous: str | Path | None = None) -> None:
    """Write a checkpoint, in whose place another one stays until this one is whole.

    Args:
        checkpoint: What `torch.save` takes.
        path: The file.
        previous: Where a file that is there already goes; without it, it is replaced.

    Raises:
        OSError: It cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    # The archive ends with the length of its comment.
    buffer.seek(-2, io.SEEK_END)
    buffer.write(struct.pack("<H", _SEAL))
    buffer.write(_NAME + hashlib.sha256(buffer.getvalue()).hexdigest().encode())
    with whole(path, previous) as part:
        part.write_bytes(buffer.getbuffer())


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's contents. Nothing is read of one that is not as it was written, and no code is run.

    Raises:
        UserError: There is no such file, or it is damaged, or was not written by this package.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    content = path.read_bytes()
    body, seal = memoryview(content)[:-_SEAL], content[-_SEAL:]
    if not seal.startswith(_NAME):
        raise UserError(f"{path} is damaged, or is no checkpoint of this package: the sum at its end is missing")
    if seal != _NAME + hashlib.sha256(body).hexdigest().encode():
        raise UserError(f"{path} is damaged: its contents and the sum at its end do not agree")
    return torch.load(io.BytesIO(content), weights_only=True, map_location=map_location)
