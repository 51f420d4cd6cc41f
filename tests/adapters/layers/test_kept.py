"""What a tuned layer keeps for backward."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from snell_lightning.adapters.update.competition import SPARSIFIERS
from tests.adapters.layers.layer import make_layer, straightforward


def kept_for_backward(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterator[Tensor]) -> dict[int, int]:
    """Bytes of each storage that lives until backward and belongs to no parameter, by its address.

    Counts what autograd saves, and tensors that hang on the graph's nodes in some other way.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(x)
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        tensors += tensors_in(list(getattr(node, "__dict__", {}).values()))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return {address: size for address, size in storages.items() if address not in known}


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


class TestMemory:
    # The weight has 96 * 192 * 4 = 73,728 bytes, the input 8 * 96 * 4 = 3,072, the factors 2 * (96 + 192) *
    # 2 * 4 = 4,608 or more; a threshold has 4, and 64 are allowed for each.
    IN, OUT, ROWS = 96, 192, 8

    @pytest.mark.parametrize("slices", [1, 3])
    @pytest.mark.parametrize("sparsifier", SPARSIFIERS)
    @pytest.mark.parametrize("noise", [{}, {"dropout": 0.1, "drop_path": 0.1}], ids=["plain", "noise"])
    def test_nothing_but_the_input_and_thresholds_is_kept_for_backward(
        self, noise: dict[str, float], sparsifier: str, slices: int
    ) -> None:
        layer = make_layer(self.IN, self.OUT, slices, sparsifier=sparsifier, **noise)
        x = torch.randn(self.ROWS, self.IN, requires_grad=True)

        kept = kept_for_backward(layer, x, layer.parameters())

        assert kept.pop(x.untyped_storage().data_ptr()) == self.ROWS * self.IN * 4
        assert sum(kept.values()) <= 64 * slices

    @pytest.mark.parametrize("noise", [{}, {"dropout": 0.1, "drop_path": 0.1}], ids=["plain", "noise"])
    def test_under_autocast_the_input_is_kept_in_low_precision_alone(self, noise: dict[str, float]) -> None:
        layer = make_layer(self.IN, self.OUT, **noise)
        x = torch.randn(self.ROWS, self.IN, requires_grad=True)

        with torch.autocast("cpu", dtype=torch.bfloat16):
            kept = kept_for_backward(layer, x, layer.parameters())

        assert self.ROWS * self.IN * 2 <= sum(kept.values()) <= self.ROWS * self.IN * 2 + 64

    def test_the_update_alone_keeps_only_its_threshold(self) -> None:
        (delta,) = make_layer(self.IN, self.OUT).deltas

        kept = kept_for_backward(lambda _: delta.weight(), torch.empty(0), delta.parameters())

        assert sum(kept.values()) <= 64

    def test_the_count_would_see_a_matrix_of_the_weights_size(self) -> None:
        layer = make_layer(self.IN, self.OUT)
        x = torch.randn(self.ROWS, self.IN, requires_grad=True)

        kept = kept_for_backward(lambda x: straightforward(layer, x), x, layer.parameters())

        assert self.IN * self.OUT * 4 in kept.values()
