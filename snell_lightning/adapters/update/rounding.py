"""Rounding to bf16 at random: up or down with the probability that keeps a number on average.

Rounded to the nearest, `W + dW` loses an entry of dW that is below half the spacing of bf16 there, always. Rounded at
random, between the two neighbours a and a + u, it becomes a + u with probability (W + dW - a) / u: right on average,
with a variance of u^2 / 6 where rounding to the nearest has errors of u^2 / 12 in the mean. So one product with the sum
keeps the update, at twice the rounding noise of a bf16 weight, drawn anew in each step.
"""

import torch
from torch import Tensor

from snell_lightning.adapters.update.competition import tiles


def round_at_random(matrix: Tensor, seed: int | Tensor) -> Tensor:
    """`matrix` in bf16, each entry rounded to one of its neighbours; the same again with the same seed.

    Args:
        matrix: `(out, in)` in fp32.
        seed: Of the numbers; a tensor is read by the host.
    """
    generator = torch.Generator(matrix.device).manual_seed(int(seed))
    rounded = torch.empty_like(matrix, dtype=torch.bfloat16)
    for rows in tiles(matrix):
        bits = matrix[rows].view(torch.int32)
        # What is cut off is the lower half of the bits; with it a number is added that carries into the upper one.
        carried = torch.randint(2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
        cut = carried.add_(bits).bitwise_and_(-(2**16)).view(torch.float32)
        rounded[rows] = torch.where(matrix[rows].isnan(), matrix[rows], cut)
    return rounded
