"""Read the tensors of a weights file, recognised by its content; nothing that the file names is ever called.

| file | recognised by | read by |
|---|---|---|
| safetensors | its header | safetensors |
| PyTorch's zip archive, or its older pickle | a pickle's first bytes | `torch.load(weights_only=True)` |
| NumPy's `.npz`, as JAX models are released in | `.npy` members of a zip archive | NumPy, without pickle |
| a folder with one of these, or with the parts of one | an index of parts, else the only such file | each as above |

Training checkpoints hold objects beside the tensors, such as the arguments of the run. Their classes are not imported:
in the place of each object comes an empty dictionary.
"""

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from snell_lightning.adapters.errors import UserError, some

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_EXPECTED = (
    "expected a safetensors file, a PyTorch file (.pth, .pt, .bin, .ckpt), a NumPy archive of a JAX model (.npz), or a "
    "folder with one of them"
)
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".npz")


def is_numpy_archive(path: Path) -> bool:
    """Whether a file is what JAX models are released in: arrays in a zip archive."""
    return path.is_file() and zipfile.is_zipfile(path) and any(name.endswith(".npy") for name in _members(path))


def weights_file(path: str | Path) -> Path:
    """The file itself, or the one in a folder; a folder's index of parts where it has one.

    Raises:
        UserError: There is nothing there, or nothing that is clear.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"there is no file {path} with the backbone's weights")
    if not path.is_dir():
        return path
    indices = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.bin.index.json"))
    found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    found = [file for file in found if file.suffix == ".safetensors"] or found
    if indices:
        return indices[0]
    if len(found) == 1:
        return found[0]
    what = f"several files of weights ({some([file.name for file in found])})" if found else "no file of weights"
    raise UserError(f"the folder {path} has {what}; name the file")


def read_state_dicts(path: Path) -> dict[str, dict[str, Tensor]]:
    """All dictionaries of tensors that a file holds, each by its place in it: `""`, `model`, `state_dict`, `teacher`.

    Args:
        path: A file, as `weights_file` gives it.

    Raises:
        UserError: It is not of a form that can be read, is damaged, or needs code to be run.
    """
    if path.name.endswith(".index.json"):
        return {"": dict(_parts(path))}
    with path.open("rb") as file:
        start = file.read(64)
    if len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        try:
            return {"": load_file(path)}
        except Exception as error:
            raise UserError(f"{path} is damaged: {error}") from error
    if start.startswith(_ZIP):
        members = _members(path)
        if any(name.endswith(".npy") for name in members):
            return {"": _arrays(path)}
        if any(name.endswith("/constants.pkl") for name in members):
            raise UserError(
                f"{path} is a TorchScript program, which would have to be run; save its state_dict() with torch.save, "
                "or take the release in safetensors"
            )
    if start.startswith((_ZIP, _PICKLE)):
        return dict(_dictionaries(_unpickled(path)))
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`")
    raise UserError(f"{path} is no file of weights; {_EXPECTED}")


def _parts(index: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model in several files, by Hugging Face's index of them."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is no index of a model's parts") from error
    for name in names:
        part = index.parent / name
        if not part.is_file():
            raise UserError(f"{index} names {name}, which is not beside it")
        for tensors in read_state_dicts(part).values():
            yield from tensors.items()


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _arrays(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(np.ascontiguousarray(archive[name])) for name in archive.files}
    except (ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} has something else than arrays in it, or is damaged: {error}") from error


class _Nothing:
    """Stands for every class and function that a file names: whatever it is given, an empty dictionary comes out."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict()


def _unpickled(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        pass
    except Exception as error:
        raise UserError(f"{path} is damaged, or no PyTorch file: {_line(error)}") from error
    foreign: list[str] = []
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(_Nothing, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        named = f", such as {some(foreign)}" if foreign else ""
        raise UserError(
            f"{path} is damaged, or cannot be read without running code that it names{named}; save its state_dict() "
            "alone, with torch.save or as safetensors"
        ) from error


def _dictionaries(content: Any, place: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary in a checkpoint that has tensors under names, and where."""
    if not isinstance(content, dict):
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield place, {name: tensor.detach() for name, tensor in tensors.items()}
    for key, value in content.items():
        if isinstance(key, str):
            yield from _dictionaries(value, f"{place}.{key}" if place else key)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
