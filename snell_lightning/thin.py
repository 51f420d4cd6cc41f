"""Checkpoints that hold what is trained and nothing else, wherever the state of a whole model stands in them.

Lightning puts one into `state_dict`, and callbacks that average weights add states of their own. A thin checkpoint of
ViT-B is a few megabytes; what it lacks is in the pretrained backbone, from which it is completed when it is loaded.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from typing import Any

from torch import Tensor

from snell_lightning.adapters.names import plain_name


def thin_out(checkpoint: dict[str, Any], own: Collection[str], trained: Collection[str]) -> list[list[str]]:
    """Leave the trained tensors alone in every state of a whole model.

    Args:
        checkpoint: Changed in place.
        own: Names of the tensors in the model's state, without what a compiler or a strategy adds to them.
        trained: Those of them that are trained.

    Returns:
        Where such states stand: the keys that lead to each.
    """
    whole = list(_states(checkpoint, set(own)))
    for place, state in whole:
        _put(checkpoint, place, {key: state[name] for name in state if (key := plain_name(name)) in trained})
    return [list(place) for place, _ in whole]


def complete(checkpoint: dict[str, Any], places: Sequence[Sequence[str]], own: Mapping[str, Tensor]) -> None:
    """Put the frozen tensors back.

    Args:
        checkpoint: Changed in place.
        places: What `thin_out` gave.
        own: The model's state, of which the frozen tensors are taken.
    """
    for place in places:
        state = reduce(getitem, place, checkpoint)
        _put(checkpoint, place, {name: state.get(plain_name(name), tensor) for name, tensor in own.items()})


def _states(tree: Mapping[str, Any], names: set[str]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Tensor]]]:
    """The models' states in a checkpoint, that is mappings with all of these names, and the keys that lead to them."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            if names <= {plain_name(str(name)) for name in value}:
                yield (key,), value
            else:
                yield from (((key, *place), state) for place, state in _states(value, names))


def _put(tree: dict[str, Any], place: Sequence[str], value: Any) -> None:
    """Replace what nested mappings have at the end of these keys."""
    reduce(getitem, place[:-1], tree)[place[-1]] = value
