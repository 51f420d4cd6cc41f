"""Values and gradients of a reference implementation, from the arrays of `tests/golden/layers.npz`.

Each case is one linear layer of 32 inputs and 56 outputs with zero weight and bias, rank 6 in 2 pieces, scale
0.1.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellLinear

from .reference import relative_error

ARRAYS = np.load(Path(__file__).parents[1] / "golden" / "layers.npz")
# The arrays are fp32 (spacing 1e-7 of a value), and sums over 32 to 56 entries lose about one digit.
TOLERANCE = 1e-5


@pytest.mark.parametrize(
    ("case", "sparsity"),
    [("magnitude_s0.5", 0.5), ("magnitude_s0.95", 0.95), ("dense", 0.0), ("mixture_s0.4", 0.4), ("mixture_dense", 0.0)],
)
def test_values_and_gradients_equal_the_reference_implementation(case: str, sparsity: float) -> None:
    def golden(name: str) -> Tensor:
        return torch.from_numpy(ARRAYS[f"{case}.{name}"])

    linear = nn.Linear(32, 56)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    kernel = "mixture" if case.startswith("mixture") else "distance"
    config = SnellConfig(rank=6, pieces=2, scale=0.1, sparsity=sparsity, sparsifier="magnitude", kernel=kernel)
    layer = SnellLinear(linear, config)
    (delta,) = layer.deltas
    mixing = [name for name, _ in delta.named_parameters() if not name.endswith("factors")]
    for name in mixing:
        getattr(delta, name).data.copy_(golden(name))
    delta.in_factors.data.copy_(golden("in_factors"))
    delta.out_factors.data.copy_(golden("out_factors"))
    x = golden("x").requires_grad_()

    y = layer(x)
    y.backward(golden("grad_y"))

    assert relative_error(delta.weight(), golden("delta")) < TOLERANCE
    assert relative_error(y, golden("y")) < TOLERANCE
    assert relative_error(x.grad, golden("grad_x")) < TOLERANCE
    assert relative_error(delta.in_factors.grad, golden("grad_in_factors")) < TOLERANCE
    assert relative_error(delta.out_factors.grad, golden("grad_out_factors")) < TOLERANCE
    assert mixing == (["alpha", "gamma", "beta"] if kernel == "mixture" else [])
    for name in mixing:
        assert relative_error(getattr(delta, name).grad, golden(f"grad_{name}")) < TOLERANCE
    lost = (delta.weight() == 0).float().mean().item()
    assert lost == pytest.approx(sparsity, abs=1 / delta.weight().numel())
