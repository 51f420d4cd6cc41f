"""Plan deep models faster: of many equal blocks in a row three are run, and the middle one stands for those left out.

    blocks      a  b  c ... y  z
    run         a  b  ------>  z      from b to z the input is passed on as it is
    forward     a  b  (b ... b)  z    what b did is written down once more for each block left out, with storages
    backward    z  (b ... b)  b  a    of its own; where b meets its neighbours, the copies meet theirs

This is exact where a, b and z did the same, event by event, and where nothing of b outlives its own part of the step
but gradients; otherwise all blocks are run. Weights and optimizer state of the blocks left out are there anyway.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snell_lightning.memory.trace import Recorder, Trace

# Fewer are run as they are.
_FEWEST = 5
# Attributes that tell equal blocks apart and change no storage: a name, and how often a path is dropped.
_NAMES, _RATES = ("_snell_name",), ("drop_prob",)
# An event's place: its part of the step (`forward` or `backward`), the block that made its storage, and which it is.
_Place = tuple[str, int, int]


@dataclass
class _Row:
    """Equal blocks in a row, and the events between which each of the three that are run went forward and backward."""

    kept: list[nn.Module]
    left_out: list[nn.Module]
    forward: list[int] = field(default_factory=list)
    backward: dict[int, int] = field(default_factory=dict)
    usual: bool = True


class Cut:
    """A model of which some blocks are left out while its step is recorded.

    Args:
        model: The model, as it is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rows = list(_equal_rows(model))
        self._gradients: list[dict[int, list[int]]] = []
        self._filled = (0, 0)

    @property
    def leaves_out(self) -> bool:
        """Whether there is anything to leave out."""
        return bool(self._rows)

    @contextmanager
    def applied(self, recorder: Recorder) -> Iterator[None]:
        """Within, the blocks are left out, and it is noted where the others begin and end."""
        before: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        for row in self._rows:
            row.forward, row.backward, row.usual = [], {}, True
            for place, block in enumerate(row.kept):
                before.append((block, vars(block).get("forward")))
                block.forward = _watched(block.forward, row, place, recorder)
            for block in row.left_out:
                before.append((block, vars(block).get("forward")))
                block.forward = _passed_on
        try:
            yield
        finally:
            for block, forward in before:
                del block.forward
                if forward is not None:
                    block.forward = forward

    def fill_gradients(self, recorder: Recorder) -> None:
        """After backward: give the blocks left out the gradients that they would have."""
        start = len(recorder.deltas)
        self._gradients = []
        for row in self._rows:
            made: dict[int, list[int]] = {}
            parameters = [list(block.parameters()) for block in row.left_out]
            for index, parameter in enumerate(row.kept[1].parameters()):
                if parameter.grad is None:
                    continue
                others = []
                for own in parameters:
                    own[index].grad = gradient = torch.empty_like(parameter.grad)
                    others.append(recorder.serial(gradient))
                made[recorder.serial(parameter.grad)] = others
            self._gradients.append(made)
        self._filled = start, len(recorder.deltas)

    def whole(self, trace: Trace) -> Trace | None:
        """The trace of the whole model; None where that cannot be told from this one."""
        events = _Events(trace, self._filled)
        for number, (row, gradients) in enumerate(zip(self._rows, self._gradients, strict=True)):
            inserted = events.repeat(row, gradients)
            if inserted is None:
                return None
            for other in self._rows[number + 1 :]:
                other.forward = [_shifted(mark, inserted) for mark in other.forward]
                other.backward = {place: _shifted(mark, inserted) for place, mark in other.backward.items()}
        return events.trace()


def _passed_on(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _watched(forward: Callable[..., Any], row: _Row, place: int, recorder: Recorder) -> Callable[..., Any]:
    """A block's forward, which notes where it begins, and where its backward has come to its input."""

    def note(tensor: Any, key: int) -> None:
        def reached(_: Tensor) -> None:
            row.backward.setdefault(key, len(recorder.deltas))

        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(reached)

    def watched(x: Any = None, *args: Any, **kwargs: Any) -> Any:
        # A block that is run again in backward comes here once more.
        first = len(row.forward) == place
        if first:
            row.forward.append(len(recorder.deltas))
            note(x, place)
        y = forward(x, *args, **kwargs)
        if first:
            same = isinstance(x, Tensor) and isinstance(y, Tensor) and (x.shape, x.dtype) == (y.shape, y.dtype)
            row.usual &= same and y is not x
            if place == len(row.kept) - 1:
                row.forward.append(len(recorder.deltas))
                note(y, place + 1)
        return y

    return watched


class _Events:
    """A recorded step's events, in which those of a block can be repeated."""

    def __init__(self, trace: Trace, filled: tuple[int, int]) -> None:
        start, stop = filled
        self._owners, self._deltas = trace.owners.tolist(), trace.deltas.tolist()
        # The gradients of the blocks left out are made where these would have gone backward.
        del self._owners[start:stop], self._deltas[start:stop]
        self._kinds = trace.kinds.tolist()
        self._ends = [end - (stop - start) * (end >= stop) for end in trace.ends]

    def trace(self) -> Trace:
        """All of them."""
        owners, deltas = np.array(self._owners), np.array(self._deltas, dtype=np.int64)
        return Trace(owners, deltas, np.array(self._kinds), tuple(self._ends))

    def repeat(self, row: _Row, gradients: dict[int, list[int]]) -> list[tuple[int, int]] | None:
        """Write the middle block's events down once more for each block left out.

        Args:
            row: The blocks.
            gradients: By storage of a gradient of the middle block those of the blocks left out.

        Returns:
            Where how many events were put in; None, with nothing changed, where that would not be exact.
        """
        spans = _spans(row)
        if spans is None:
            return None
        places = self._places(spans)
        if not self._is_repeated(spans, places):
            return None
        count = len(row.left_out)
        own = {place: owner for owner, place in places.items()}
        copies: dict[tuple[int, _Place], int] = {}
        for owner, (part, block, index) in places.items():
            if block == 1:
                for number in range(1, count + 1):
                    if owner in gradients:
                        copies[number, (part, 1, index)] = gradients[owner][number - 1]
                    else:
                        copies[number, (part, 1, index)] = len(self._kinds)
                        self._kinds.append(self._kinds[owner])

        def storage(owner: int, number: int) -> int:
            """The storage that the copy of that number has in the place of one that the middle block refers to."""
            if owner not in places:
                return owner
            part, block, index = places[owner]
            neighbour = number + block - 1
            if neighbour == 0:
                return own[part, 1, index]
            return own[part, 2, index] if neighbour == count + 1 else copies[neighbour, (part, 1, index)]

        middle = {part: blocks[1] for part, blocks in spans.items()}
        written = {
            part: [
                (storage(owner, number), delta)
                for number in (range(1, count + 1) if part == "forward" else range(count, 0, -1))
                for owner, delta in zip(self._owners[start:stop], self._deltas[start:stop], strict=True)
            ]
            for part, (start, stop) in middle.items()
        }
        # The middle block's next neighbour is the first copy, and the last block's neighbour before is the last one.
        for blocks in spans.values():
            for block, number in ((1, 0), (2, count + 1)):
                for event in range(*blocks[block]):
                    owner = self._owners[event]
                    if owner in places and places[owner][1] != block:
                        part, other, index = places[owner]
                        beside = number + other - block
                        if beside < 0:
                            continue
                        self._owners[event] = own[part, 1, index] if beside == 0 else copies[beside, (part, 1, index)]
        # After the middle block going forward, before it going backward.
        at = {"forward": middle["forward"][1]} | ({"backward": middle["backward"][0]} if "backward" in middle else {})
        inserted = [(at[part], len(events)) for part, events in written.items()]
        for part in sorted(at, key=at.__getitem__, reverse=True):
            self._owners[at[part] : at[part]] = [owner for owner, _ in written[part]]
            self._deltas[at[part] : at[part]] = [delta for _, delta in written[part]]
        self._ends = [_shifted(end, inserted, after=True) for end in self._ends]
        return inserted

    def _places(self, spans: dict[str, list[tuple[int, int]]]) -> dict[int, _Place]:
        """Storages that the three blocks made."""
        born: dict[int, int] = {}
        for event, owner in enumerate(self._owners):
            born.setdefault(owner, event)
        places: dict[int, _Place] = {}
        for part, blocks in spans.items():
            for block, (start, stop) in enumerate(blocks):
                made = dict.fromkeys(owner for owner in self._owners[start:stop] if start <= born[owner] < stop)
                places |= {owner: (part, block, index) for index, owner in enumerate(made)}
        return places

    def _is_repeated(self, spans: dict[str, list[tuple[int, int]]], places: dict[int, _Place]) -> bool:
        """Whether the three did the same, and the middle one had to do with its neighbours alone."""
        seen: list[list[Any]] = [[], [], []]
        around: set[int] = set()
        for blocks in spans.values():
            for block, (start, stop) in enumerate(blocks):
                around |= set(range(start, stop))
                for owner, delta in zip(self._owners[start:stop], self._deltas[start:stop], strict=True):
                    part, of, index = places.get(owner, ("", -1, -1))
                    seen[block].append(((part, index) if of == block else None, delta))
                    strange = of == -1 if block == 1 else of == 2 - block
                    if strange:
                        return False
        outside = (owner for event, owner in enumerate(self._owners) if event not in around)
        return seen[0] == seen[1] == seen[2] and all(places.get(owner, ("", 0, 0))[1] != 1 for owner in outside)


def _spans(row: _Row) -> dict[str, list[tuple[int, int]]] | None:
    """The events of each of the three blocks, by part of the step."""
    if not row.usual or len(row.forward) != 4 or len(row.backward) not in (0, 4):
        return None
    first, middle, last, end = row.forward
    # What a block was given may be freed only when it has returned; of the last one that is beyond its end.
    end = max(end, last + last - middle)
    spans = {"forward": [(first, middle), (middle, last), (last, end)]}
    if row.backward:
        spans["backward"] = [(row.backward[block + 1], row.backward[block]) for block in range(3)]
    return spans if all(start <= stop for blocks in spans.values() for start, stop in blocks) else None


def _shifted(mark: int, inserted: Sequence[tuple[int, int]], after: bool = False) -> int:
    """Where a mark is once events have been put in; one at the very place is moved, or stays if it is an end."""
    return mark + sum(count for at, count in inserted if at < mark or (at == mark and not after))


def _equal_rows(model: nn.Module) -> Iterator[_Row]:
    """Blocks that follow each other in a list and are built alike; of rows within rows the outer ones."""
    for child in model.children():
        rest: list[nn.Module] = list(child.children()) if isinstance(child, (nn.ModuleList, nn.Sequential)) else []
        found = []
        while rest:
            built = _built(rest[0])
            equal = 1
            while equal < len(rest) and _built(rest[equal]) == built:
                equal += 1
            if equal >= _FEWEST and any(True for _ in rest[0].parameters()):
                found.append(_Row([rest[0], rest[1], rest[equal - 1]], rest[2 : equal - 1]))
            rest = rest[equal:]
        if found:
            yield from found
        else:
            yield from _equal_rows(child)


def _built(module: nn.Module) -> Any:
    """What a module's storages depend on: classes, settings and sizes, through all of its parts."""
    settings = {
        name: bool(value) if name in _RATES else repr(value) if is_dataclass(value) else value
        for name, value in vars(module).items()
        if name not in _NAMES
        and (isinstance(value, (bool, int, float, str, tuple, torch.dtype)) or is_dataclass(value))
    }
    tensors = [
        (name, None if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad))
        for own in (module._parameters, module._buffers)
        for name, tensor in own.items()
    ]
    return type(module), settings, tensors, [(name, _built(child)) for name, child in module.named_children()]
