"""Tuned layers that the tests here share, and what they are compared with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellLinear
from snell_lightning.adapters.update.noise import Noise
from tests.adapters import reference

LOW_PRECISIONS = [torch.bfloat16, torch.float16]


def make_layer(
    in_features: int = 12, out_features: int = 9, slices: int = 1, bias: bool = True, **settings: Any
) -> SnellLinear:
    """A layer of rank 4 whose updates are as large as its weights."""
    config = SnellConfig(**{"rank": 4, "sparsity": 0.5, "scale": 1.0, **settings})
    layer = SnellLinear(nn.Linear(in_features, out_features, bias=bias), config, slices)
    for delta in layer.deltas:
        nn.init.normal_(delta.in_factors)
        nn.init.normal_(delta.out_factors)
    return layer


def gradients(layer: SnellLinear, forward: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor) -> list[Tensor]:
    """Gradients of the input and of every factor."""
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(forward(x), [x, *layer.deltas.parameters()], grad_y))


def straightforward(layer: SnellLinear, x: Tensor, masks: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
    """The reference's output for the layer's tensors."""
    return reference.tuned(x, layer.weight.flatten(1), layer.bias, list(layer.deltas), masks)


def masks_of(noise: Noise, x: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of mean 1 that noise multiplies with: of entries `(rows, in)`, and of rows `(rows, 1)`."""
    rows = x.numel() // x.shape[-1]
    dropped = noise.dropped_entries(rows, x.shape[-1], x.device)
    entries = torch.ones(rows, x.shape[-1]) if dropped is None else (~dropped).float() / (1 - noise.dropout)
    samples = torch.full((rows, 1), 1 / (1 - noise.drop_path))
    for lost in noise.row_ranges(rows, len(x) if x.dim() > 1 else 1)[1]:
        samples[lost] = 0
    return entries, samples
