"""Which rows of a fused layer belong to which projection, found by following them through the model's own code.

A backbone may hold q, k and v in one layer, in any order: one below the other, head by head, of unequal sizes, with an
MLP's first layer beside them. So each output of a layer is numbered by its row, and the model runs once on tensors
without data, while the numbers go where the values go:

    qkv(x) (1, tokens, 12) ── view, permute, unbind ──> q, k, v ──> attention(q, k, v)
    rows 0..11                                                       rows 0..3, 4..7, 8..11

What arrives together at an operand of attention, or of a product of two parts of the same layer, as a gate and its
values are, is one projection. A layer is divided if such parts make up all of its rows; otherwise its entries compete
as one.
"""

import copy
import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from snell_lightning.adapters.errors import UserError
from snell_lightning.adapters.examples import attempts
from snell_lightning.adapters.finding import Layer
from snell_lightning.adapters.layers.calls import CalledInstead

_aten = torch.ops.aten
# Attribute of a tensor: for each of its entries the row that it came from, or NO_ROW.
_ROWS, _NO_ROW = "_snell_rows", -1
# Attribute of a tensor of such numbers: the different ones among them.
_SET = "_snell_set"

# Operations that move entries without changing their shape, or into a shape that is given.
_SAME = {_aten.clone, _aten.contiguous, _aten.detach, _aten.alias, _aten._to_copy, _aten.lift_fresh, _aten.expand_as}
_RESHAPE = {_aten.view, _aten._unsafe_view, _aten.reshape, _aten._reshape_alias}
_MOVE = {
    _aten.permute,
    _aten.transpose,
    _aten.t,
    _aten.unsqueeze,
    _aten.squeeze,
    _aten.expand,
    _aten.select,
    _aten.slice,
    _aten.split,
    _aten.split_with_sizes,
    _aten.unbind,
    _aten.chunk,
    _aten.unfold,
    _aten.flip,
    _aten.roll,
    _aten.repeat,
    _aten.diagonal,
    _aten.pixel_shuffle,
    _aten.pixel_unshuffle,
    _aten.channel_shuffle,
    _aten.constant_pad_nd,
}
_JOIN = {_aten.cat, _aten.stack}
_ALL_MOVES = _SAME | _RESHAPE | _MOVE | _JOIN
_REDUCE = {_aten.sum, _aten.mean, _aten.amax, _aten.amin, _aten.max, _aten.min}
# Products of activations, as in attention.
_ATTEND = {_aten.bmm, _aten.baddbmm}
# Products with weights: what comes out belongs to another layer.
_CONTRACT = {_aten.mm, _aten.addmm, _aten.mv, _aten.addmv, _aten.dot}
_MULTIPLY = {_aten.mul, _aten.mul_}


@dataclass
class _Seen:
    """The sets of a layer's rows that arrived somewhere together, and those of them that did so in a product.

    Attributes:
        values: The rows that attention averages.
    """

    rows: int
    parts: set[frozenset[int]] = field(default_factory=set)
    factors: set[frozenset[int]] = field(default_factory=set)
    values: set[int] = field(default_factory=set)


def divide(
    model: nn.Module,
    layers: Mapping[str, Layer],
    wanted: Iterable[str],
    example: Any = None,
    uncalled: set[str] | None = None,
    values: set[tuple[str, int]] | None = None,
) -> dict[str, list[list[int]] | None]:
    """For each wanted layer the rows of its projections, that of the lowest row first: one list if it is not fused.

    Args:
        model: Any model; it is not changed, nor run on data.
        layers: Its linear layers and 1x1 convolutions, by name.
        wanted: Names of some of them.
        example: What the model is called with, a tensor or a tuple; by default images of the size the model names.
        uncalled: Takes the names of layers that the model computes with without calling them.
        values: Takes the projections to attention's values, as a layer's name and a place in its list.

    Returns:
        Lists that have each row of the layer once; None for a layer that could not be followed, since the model does
        not run on such inputs or does not call it.

    Raises:
        UserError: The model does not run on the example.
    """
    found: dict[str, list[list[int]] | None] = dict.fromkeys(wanted)
    for name, inputs in attempts(model, layers, found, example):
        error, seen, met = _follow(model, name, layers, inputs)
        if uncalled is not None:
            uncalled.update(met)
        if error is not None and example is not None:
            raise UserError(f"the model does not run on the example: {type(error).__name__}: {error}") from error
        for layer in found.keys() & seen:
            parts = _partition(seen[layer])
            # A run that ended early may not have come to where a layer is divided.
            if found[layer] is None and parts is not None and (error is None or len(parts) > 1):
                # A single weight has nothing to compete with.
                width = layers[layer].weight.shape[1]
                parts = [list(range(seen[layer].rows))] if width == min(map(len, parts)) == 1 else parts
                found[layer], averaged = parts, seen[layer].values
                if values is not None:
                    values.update((layer, place) for place, part in enumerate(parts) if averaged.issuperset(part))
        if None not in found.values() or (error is None and not name):
            break
    return found


def _follow(
    model: nn.Module, name: str, layers: Mapping[str, Layer], inputs: tuple[Any, ...]
) -> tuple[Exception | None, dict[str, _Seen], set[str]]:
    """Run a part of a model on tensors without data.

    Returns:
        What ended the run too early, what was seen of its layers, and those that it computes with without calling them.
    """
    part = model.get_submodule(name)
    tensors = [*part.parameters(), *part.buffers()]
    mode = next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    device = tensors[0].device if tensors else torch.device("cpu")
    follower = _Follower()
    failure, calls = None, None
    # torch would log each operation that a guessed input does not fit.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        with torch.random.fork_rng(devices=[]), mode, torch.no_grad():
            # A copy, so that nothing that a forward leaves behind stays. It has no data of its own and no hooks.
            twins: dict[int, Any] = {id(t): t if isinstance(t, FakeTensor) else mode.from_tensor(t) for t in tensors}
            run = copy.deepcopy(part, twins).eval()
            for module in run.modules():
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
            for full, layer in layers.items():
                if id(layer) in twins:
                    twins[id(layer)].register_forward_hook(follower.number(full, layer))
            inside = {full: twins[id(layer)] for full, layer in layers.items() if id(layer) in twins}
            calls = CalledInstead(inside)
            calls.watch()
            inputs = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), inputs)
            with follower, calls:
                output = run(*inputs)
            if name:
                follower.forget(tree_leaves(output))
    except Exception as error:
        # Whatever a foreign module raises on inputs that were guessed.
        failure = error
    finally:
        log.disabled = disabled
    return failure, follower.seen, set() if calls is None else calls.met


def _partition(seen: _Seen) -> list[list[int]] | None:
    """The rows of each projection; all rows together where none was seen, None where they cannot be told apart."""
    whole = frozenset(range(seen.rows))
    found = _smallest(seen.factors)
    if not found or found == [whole]:
        return [sorted(whole)]
    rest = whole.difference(*found)
    found += _smallest(part for part in seen.parts if part <= rest)
    if sum(map(len, found)) != seen.rows or frozenset().union(*found) != whole:
        return None
    return sorted(sorted(part) for part in found)


def _smallest(parts: Iterable[frozenset[int]]) -> list[frozenset[int]]:
    """Those that hold no other one."""
    found: list[frozenset[int]] = []
    for part in sorted(parts, key=len):
        if not any(part >= other for other in found):
            found.append(part)
    return found


class _Follower(TorchDispatchMode):
    """Carries the rows' numbers along with tensors, and notes where they arrive.

    Attributes:
        seen: What was seen of each layer that was called, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, _Seen] = {}
        self._names: list[str] = []
        self._starts: list[int] = [0]

    def number(self, name: str, layer: Layer) -> Any:
        """A forward hook that numbers a layer's outputs; numbers of different layers differ."""
        rows = len(layer.weight)
        start = self._starts[-1]
        self._names.append(name)
        self._starts.append(start + rows)

        def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
            self.seen.setdefault(name, _Seen(rows))
            with no_dispatch():
                numbers = torch.arange(start, start + rows)
                numbers = numbers[:, None, None] if isinstance(layer, nn.Conv2d) else numbers
                setattr(output, _ROWS, numbers.expand(output.shape))

        return hook

    def forget(self, outputs: Iterable[Any]) -> None:
        """Leave out layers whose numbers a part of the model gives on: what becomes of them is not known."""
        with no_dispatch():
            for output in outputs:
                if hasattr(output, _ROWS):
                    for name, _ in self._by_layer(self._set(getattr(output, _ROWS))):
                        self.seen.pop(name, None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and do to the numbers of its operands what it does to their entries."""
        output = func(*args, **(kwargs or {}))
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if hasattr(leaf, _ROWS)]
        if operands:
            with no_dispatch():
                self._carry(func.overloadpacket, args, kwargs or {}, operands, output)
        return output

    def _carry(
        self, operation: Any, args: tuple[Any, ...], kwargs: Any, operands: Sequence[Tensor], output: Any
    ) -> None:
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if operation in _ALL_MOVES:
            for result, numbers in zip(results, _moved(operation, args, kwargs, results), strict=True):
                setattr(result, _ROWS, numbers)
            return
        numbers = getattr(operands[0], _ROWS)
        if operation is _aten.convolution and (by_channel := _by_channel(args, numbers, output)) is not None:
            setattr(output, _ROWS, by_channel)
            return
        parts = [self._set(getattr(operand, _ROWS)) for operand in operands] if len(operands) > 1 else []
        attends = operation in _ATTEND or "attention" in operation.__name__
        if attends or operation in _CONTRACT or operation is _aten.convolution:
            self._note(parts or [self._set(numbers)], lambda name: attends)
            for averaged in _averaged(operation, args) if attends else ():
                for name, rows in self._by_layer(self._set(getattr(averaged, _ROWS))):
                    self.seen[name].values |= rows
            return
        if any(parts[0].isdisjoint(part) for part in parts[1:]):
            # Two layers' outputs, or two parts of one, are combined entry by entry. In a sum the latter may be the
            # halves of a rotary embedding, which stay one projection; in a product they are a gate and its values.
            layers = Counter(name for part in parts for name, _ in self._by_layer(part))
            if operation in _MULTIPLY or max(layers.values()) == 1:
                self._note(parts, lambda name: operation in _MULTIPLY and layers[name] > 1)
                return
        kept = [(result, _kept(operation, args, kwargs, numbers, operands[0], result)) for result in results]
        if all(numbers is None for _, numbers in kept):
            self._note(parts or [self._set(numbers)], lambda name: False)
        for result, found in kept:
            if found is not None:
                setattr(result, _ROWS, found)

    def _note(self, parts: Iterable[frozenset[int]], in_product: Callable[[str], bool]) -> None:
        for part in parts:
            for name, rows in self._by_layer(part):
                self.seen[name].parts.add(rows)
                if in_product(name):
                    self.seen[name].factors.add(rows)

    def _set(self, numbers: Tensor) -> frozenset[int]:
        """The different numbers; of a tensor that goes on through many operations they are found once."""
        known = getattr(numbers, _SET, None)
        if known is None:
            few = numbers[tuple(slice(1) if stride == 0 else slice(None) for stride in numbers.stride())]
            # The last place is that of NO_ROW, -1.
            present = torch.zeros(self._starts[-1] + 1, dtype=torch.bool)
            present[few.reshape(-1)] = True
            known = frozenset(present[:-1].nonzero().flatten().tolist())
            setattr(numbers, _SET, known)
        return known

    def _by_layer(self, part: frozenset[int]) -> Iterator[tuple[str, frozenset[int]]]:
        """Numbers as rows of the layers that they belong to."""
        rows: dict[int, list[int]] = {}
        for number in part:
            rows.setdefault(bisect_right(self._starts, number) - 1, []).append(number)
        for layer, numbers in rows.items():
            yield self._names[layer], frozenset(number - self._starts[layer] for number in numbers)


def _averaged(operation: Any, args: tuple[Any, ...]) -> Iterator[Tensor]:
    """The operand of attention that weights average over its tokens.

    The third of attention's own functions; of a matrix product with weights that are of no layer's rows, the operand
    that has rows along the side that stays and none along the one that is summed over, as q and k have.
    """
    if operation not in _ATTEND:
        yield from (operand for operand in args[2:3] if hasattr(operand, _ROWS))
        return
    operands = [(operand, getattr(operand, _ROWS, None)) for operand in args[operation is _aten.baddbmm :][:2]]
    sides = [[numbers is not None and _varies(numbers, dim) for dim in (-2, -1)] for _, numbers in operands]
    for (operand, _), (high, wide), other, summed in zip(operands, sides, reversed(sides), (-1, -2), strict=True):
        stays, goes = (high, wide) if summed == -1 else (wide, high)
        if stays and not goes and not any(other):
            yield operand


def _varies(numbers: Tensor, dim: int) -> bool:
    """Whether entries that differ in their place along a dimension alone are of different rows."""
    if not numbers.stride(dim) or numbers.shape[dim] < 2:
        return False
    return not torch.equal(numbers.narrow(dim, 0, 1).expand_as(numbers), numbers)


def _moved(operation: Any, args: tuple[Any, ...], kwargs: Any, results: Sequence[Tensor]) -> list[Tensor]:
    """The numbers of what an operation makes that only moves entries."""
    if operation in _JOIN:
        joined = [getattr(t, _ROWS, None) for t in args[0]]
        filled = [
            torch.full((1,), _NO_ROW).expand(tensor.shape) if numbers is None else numbers
            for tensor, numbers in zip(args[0], joined, strict=True)
        ]
        return [_compact(operation(filled, *args[1:], **kwargs))]
    numbers = getattr(args[0], _ROWS)
    if operation in _SAME:
        return [numbers.expand(results[0].shape)]
    if operation in _RESHAPE:
        return [_compact(numbers.reshape(results[0].shape))]
    if operation is _aten.constant_pad_nd:
        return [_aten.constant_pad_nd(numbers, args[1], _NO_ROW)]
    moved = operation(numbers, *args[1:], **kwargs)
    return [moved] if isinstance(moved, Tensor) else list(moved)


def _kept(
    operation: Any, args: tuple[Any, ...], kwargs: Any, numbers: Tensor, operand: Tensor, result: Tensor
) -> Tensor | None:
    """The numbers of a result that has its entries from an operand's one by one; None where they are mixed."""
    if operation in _REDUCE:
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if dims is None or dims == []:
            return None
        keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        least, most = numbers.amin(dims, keep), numbers.amax(dims, keep)
        return least if torch.equal(least, most) and least.shape == result.shape else None
    if result.shape == operand.shape:
        return numbers
    name = operation.__name__
    if ("pool" in name or "upsample" in name) and result.shape[:2] == operand.shape[:2]:
        return _per_channel(numbers, result)
    if result.dim() >= operand.dim() and _broadcasts(operand, result):
        return numbers.expand(result.shape)
    return None


def _broadcasts(operand: Tensor, result: Tensor) -> bool:
    pairs = zip(reversed(operand.shape), reversed(result.shape), strict=False)
    return all(size in (1, wanted) for size, wanted in pairs)


def _by_channel(args: tuple[Any, ...], numbers: Tensor, result: Tensor) -> Tensor | None:
    """The numbers behind a convolution in groups that keeps the channels in their places, as depthwise ones do."""
    kept = args[8] > 1 and hasattr(args[0], _ROWS) and args[0].shape[1] == result.shape[1]
    return _per_channel(numbers, result) if kept else None


def _per_channel(numbers: Tensor, result: Tensor) -> Tensor:
    """Numbers `(batch, channels, ...)`, the same all over an image, for an image of another size."""
    first = numbers[(slice(None), slice(None), *[slice(1)] * (numbers.dim() - 2))]
    return first.expand(result.shape)


def _compact(numbers: Tensor) -> Tensor:
    """The same numbers, stored once along dimensions along which they do not change."""
    for dim in range(numbers.dim()):
        first = numbers.narrow(dim, 0, min(1, numbers.shape[dim]))
        if numbers.stride(dim) and numbers.shape[dim] > 1 and torch.equal(first.expand_as(numbers), numbers):
            numbers = first.expand_as(numbers)
    return numbers
