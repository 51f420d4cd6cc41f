"""Put published weights into a timm model, and see that each of its tensors gets its own.

Where a file holds several models (a student and its teacher, weights and their running average) or puts something
before their names (`module.`, `model.`, `module.base_encoder.`, `vision_model.`), the place is taken whose names fit
the model best; of two that fit alike a teacher's or an average. timm's own filter of the model's family then translates
the authors' release and resamples position embeddings, patch embeddings and window tables to the model's sizes.
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snell_lightning.adapters.errors import UserError, some
from snell_lightning.adapters.finding import heads
from snell_lightning.backbones.published.naming import prefixes, to_timm
from snell_lightning.backbones.published.reading import is_numpy_archive, read_state_dicts, weights_file
from snell_lightning.backbones.resample import fit

# What timm's modules call the function that reads the authors' release.
_FILTERS = ("checkpoint_filter_fn", "checkpoint_filter_fn_classifier", "_filter_fn", "_filter_torchvision_pretrained")
# Of two alike: averages and teachers first. MoCo's momentum encoder is no average that its authors would use.
_PREFERRED, _LAST = re.compile(r"ema\b|ema\.|teacher"), re.compile(r"momentum|predictor|decoder|projector|text")
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LoadedWeights:
    """What became of a file's tensors.

    Attributes:
        path: The file.
        place: Where in it they were, such as `model` or `state_dict: module.base_encoder.`; empty if nowhere else.
        taken: Names of the model's tensors that were set.
        changed: Those of them that had another shape in the file, and were resampled.
        new: Names of those that the file does not have: the head's.
        left: Names in the file that the model has no place for.
    """

    path: Path
    place: str
    taken: tuple[str, ...]
    changed: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        """One line."""
        parts = [f"{len(self.taken)} tensors from {self.path}" + (f" ({self.place})" if self.place else "")]
        if self.changed:
            parts.append(f"resampled: {some(self.changed)}")
        parts.append(f"new: {some(self.new)}" if self.new else "its own head")
        if self.left:
            parts.append(f"left in the file: {some(self.left)}")
        return "; ".join(parts)


@dataclass
class _Candidate:
    """One way to read a file: a place in it, and its tensors by the names that the model may have."""

    place: str
    tensors: dict[str, Tensor]
    resampled: set[str]
    score: tuple[Any, ...] = ()


def load_weights(model: nn.Module, path: str | Path, name: str) -> LoadedWeights:
    """Load the weights of a file into a timm model, in place.

    Args:
        model: The model, on the CPU, in the sizes that it is to have.
        path: A file, or a folder with one; `reading` says of which forms.
        name: The model's, for messages.

    Returns:
        What was set from what.

    Raises:
        UserError: The file cannot be read, a tensor of the backbone is not in it or has another shape, or it has more
            blocks than the model. The head may be missing, or be of other classes; it is a fresh one then.
    """
    file = weights_file(path)
    if is_numpy_archive(file):
        return _from_arrays(model, file, name)
    own = model.state_dict()
    best = max(_candidates(model, own, file), key=lambda candidate: candidate.score, default=None)
    if best is None or not best.score[0]:
        names = {name for tensors in read_state_dicts(file).values() for name in tensors}
        has = f"; it has {some(names)}, and the model {some(own)}" if names else ""
        raise UserError(f"{file} has no tensors of {name!r}{has}")
    head = {key for key in own if _in_head(key, model)}
    fitted = fit(best.tensors, model)
    best.resampled |= {key for key in own.keys() & fitted.keys() if fitted[key] is not best.tensors[key]}
    best.tensors = fitted
    fitting = {key: tensor for key, tensor in best.tensors.items() if key in own and tensor.shape == own[key].shape}
    for key in head - fitting.keys():
        # A classifier of which only the weight or only the bias fits is of other classes.
        around = key.rpartition(".")[0]
        fitting = {other: tensor for other, tensor in fitting.items() if other.rpartition(".")[0] != around}
    unset = {key for key in own.keys() - fitting.keys() - head if not key.endswith("num_batches_tracked")}
    _refuse(file, name, own, best, unset, {key for key in best.tensors if key not in own})
    broken = [key for key, tensor in fitting.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{file} has values that are no numbers, in {some(broken)}; it is damaged, or its training failed"
        )
    model.load_state_dict(fitting, strict=False)
    return LoadedWeights(
        file,
        best.place,
        tuple(fitting),
        tuple(sorted(best.resampled & fitting.keys())),
        tuple(sorted(head - fitting.keys())),
        tuple(sorted(best.tensors.keys() - own.keys())),
    )


def _in_head(key: str, model: nn.Module) -> bool:
    return key.startswith("head.") or any(key.startswith(f"{head}.") for head in heads(model))


def _candidates(model: nn.Module, own: Mapping[str, Tensor], file: Path) -> Iterator[_Candidate]:
    translate = _filter_of(model)
    for place, tensors in read_state_dicts(file).items():
        # Half precision is for storing: resampling is done in single.
        tensors = {key: tensor.float() if tensor.dtype in _HALF else tensor for key, tensor in tensors.items()}
        for prefix in prefixes(tensors):
            within = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            for named in (within, to_timm(within, own)):
                translated = translate(dict(named))
                if translated is None:
                    continue
                where = ": ".join(part for part in (place, prefix) if part)
                resized = {
                    key for key, tensor in translated.items() if key in named and tensor.shape != named[key].shape
                }
                candidate = _Candidate(where, translated, resized)
                fits = sum(key in own for key in translated)
                shapes = sum(key in own and tensor.shape == own[key].shape for key, tensor in translated.items())
                rank = bool(_PREFERRED.search(where)) - bool(_LAST.search(where))
                candidate.score = (fits, shapes, rank, -len(translated), -len(where))
                yield candidate


def _filter_of(model: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor] | None]:
    """Timm's translation of a family's releases, which gives None for what it cannot read."""
    found: Any = None
    for kind in type(model).__mro__:
        module = sys.modules[kind.__module__]
        found = found or next((getattr(module, name) for name in _FILTERS if hasattr(module, name)), None)

    def translate(tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if found is None:
            return tensors
        # One of them prints what it tries; and what does not fit it fails in as many ways.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            try:
                translated = found(tensors, model)
            except TypeError:
                translated = found(tensors)
            return {key: tensor for key, tensor in translated.items() if isinstance(tensor, Tensor)}
        return None

    return translate


def _refuse(
    file: Path, name: str, own: Mapping[str, Tensor], best: _Candidate, unset: set[str], left: set[str]
) -> None:
    """Raise unless every tensor of the backbone is set, and the file has no more blocks than the model."""
    where = f"{file} ({best.place})" if best.place else str(file)
    other = sorted(key for key in unset if key in best.tensors)
    if other:
        key = other[0]
        raise UserError(
            f"{where} does not fit {name!r}: {key} is {tuple(best.tensors[key].shape)} in the file and "
            f"{tuple(own[key].shape)} in the model"
            + (f", and so are {len(other) - 1} more" if len(other) > 1 else "")
            + "; name the architecture that the file is of"
        )
    if unset:
        raise UserError(
            f"{where} leaves {len(unset)} of the {len(own)} tensors of {name!r} unset: {some(unset)}; name the "
            "architecture that the file is of" + (f" (the file has besides {some(left)})" if left else "")
        )
    pattern = {re.sub(r"\d+", "#", key) for key in own}
    deeper = sorted(key for key in left if re.sub(r"\d+", "#", key) in pattern)
    if deeper:
        raise UserError(
            f"{where} is of a larger model than {name!r}, which has no {some(deeper)}; name the architecture that the "
            "file is of"
        )


@torch.no_grad()
def _from_arrays(model: nn.Module, file: Path, name: str) -> LoadedWeights:
    """Weights of a JAX model, by timm's own reader of them."""
    arrays = read_state_dicts(file)[""]
    load: Any = getattr(model, "load_pretrained", None)
    if load is None:
        raise UserError(f"{file} is a NumPy archive of a JAX model, of which timm reads none for {name!r}")
    numbers = [int(found[1]) for key in arrays if (found := re.search(r"encoderblock_(\d+)/", key))]
    blocks: Any = getattr(model, "blocks", None)
    if numbers and blocks is not None and max(numbers) + 1 != len(blocks):
        raise UserError(f"{file} has {max(numbers) + 1} blocks, and {name!r} has {len(blocks)}; name its architecture")
    floats = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    head = {key: tensor.clone() for key, tensor in floats.items() if _in_head(key, model)}
    for tensor in floats.values():
        tensor.fill_(torch.nan)
    try:
        load(str(file))
    except KeyError as error:
        raise UserError(f"{file} does not fit {name!r}: it has no {error.args[0]}, but {some(arrays)}") from error
    except (RuntimeError, ValueError, AttributeError, AssertionError) as error:
        line = (str(error).splitlines() or [""])[0]
        raise UserError(f"{file} does not fit {name!r}: {line}; name the architecture that the file is of") from error
    unset = {key for key, tensor in floats.items() if tensor.isnan().any()}
    if unset - head.keys():
        raise UserError(f"{file} leaves tensors of {name!r} unset: {some(unset - head.keys())}; name its architecture")
    for key in unset:
        floats[key].copy_(head[key])
    return LoadedWeights(file, "arrays of a JAX model", tuple(floats.keys() - unset), (), tuple(sorted(unset)), ())
