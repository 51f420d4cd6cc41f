"""A plain reading of the method, the thing to beat: what one writes who cares for the numbers alone.

    y = x W^T + b + drop path(dropout(x) dW^T)          dW = S(K(P, Q))

The distances come from `torch.cdist` and their gradient from autograd; the threshold is `torch.quantile` of |K|, and
the entries above it survive; the whole update, its product included, is computed under a non-reentrant checkpoint, so
that neither K nor dW is kept for backward; and each of q, k and v is a layer of its own with two products. Only the
distance kernel with the `magnitude` sparsifier is here. Autocast is off for kernel and competition, since
`torch.quantile` refuses bf16 and K is a difference of nearly equal distances.

`torch.quantile` takes 2^24 elements at most, so a larger layer raises its error.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snell_lightning.adapters import SnellLinear


class StraightforwardLinear(nn.Module):
    """A frozen linear layer and its update by autograd.

    Args:
        linear: The layer. Its parameters are taken over and frozen.
        rank: Columns of the factors over all pieces.
        sparsity: Fraction of the entries that lose the competition, in [0, 1); at 0 the update is the dense kernel.
        slices: Equal row blocks with an update and a competition of their own: 3 for a fused qkv.
        dropout: Probability of dropping an entry of the update's input while training.
        drop_path: Probability of dropping a sample's whole update while training.
        pieces: Number of distances.
        scale: Size of the coefficients.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int = 32,
        sparsity: float = 0.9,
        slices: int = 1,
        dropout: float = 0.1,
        drop_path: float = 0.0,
        pieces: int = 2,
        scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.slices = slices
        self.sparsity, self.scale = sparsity, scale
        self.dropout, self.drop_path = dropout, drop_path
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        out_features, in_features = linear.weight.shape
        self.in_factors = _factors(slices, pieces, in_features, rank, linear.weight.device)
        self.out_factors = _factors(slices, pieces, out_features // slices, rank, linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, ..., in)` to `(batch, ..., out)`."""
        weights = self.weight.chunk(self.slices)
        biases = [None] * self.slices if self.bias is None else self.bias.chunk(self.slices)
        parts = []
        for weight, bias, p, q in zip(weights, biases, self.out_factors, self.in_factors, strict=True):
            tuned = checkpoint(self.updated, x, p, q, use_reentrant=False)
            parts.append(F.linear(x, weight, bias) + tuned)
        return torch.cat(parts, dim=-1)

    def updated(self, x: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """`drop path(dropout(x) dW^T)` for the factors `p` of the outputs and `q` of the inputs."""
        with torch.autocast(x.device.type, enabled=False):
            update = self.update(p, q)
        y = F.linear(F.dropout(x, self.dropout, self.training), update)
        if self.training and self.drop_path:
            kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.drop_path
            y = y * kept.to(y.dtype) / (1 - self.drop_path)
        return y

    def update(self, p: Tensor, q: Tensor) -> Tensor:
        """The update `(out, in)`: the factor |K| of `magnitude` is a constant for the gradient."""
        matrix = sum((-1) ** piece * self.scale * torch.cdist(p[piece], q[piece]) for piece in range(len(p)))
        if self.sparsity == 0:
            return matrix
        magnitude = matrix.detach().abs()
        survive = magnitude > torch.quantile(magnitude, self.sparsity)
        return matrix * magnitude * survive

    @torch.no_grad()
    def copy_factors(self, layer: SnellLinear) -> None:
        """Take over the factors of a `SnellLinear` of the same sizes."""
        for delta, p, q in zip(layer.updates, self.out_factors, self.in_factors, strict=True):
            p.copy_(delta.out_factors)
            q.copy_(delta.in_factors)


def _factors(slices: int, pieces: int, features: int, rank: int, device: torch.device) -> nn.ParameterList:
    drawn = [torch.empty(pieces, features, rank // pieces, device=device) for _ in range(slices)]
    for factors in drawn:
        nn.init.kaiming_uniform_(factors, a=math.sqrt(5))
    return nn.ParameterList(drawn)
