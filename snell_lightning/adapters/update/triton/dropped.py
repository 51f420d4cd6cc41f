"""Where dropout and drop path leave the update out, from a seed on the device: the same again in backward.

The numbers are Philox's, by the entry's place and the sample's, so that nothing is drawn in turn and a captured graph
draws other ones with another seed.

The plain statement of the same, with other numbers, is `Noise.dropped`.
"""

import triton
import triton.language as tl
from torch import Tensor

# Entries of a mask that a program makes: with twice as many, registers spill.
BLOCK = 512


@triton.jit(do_not_specialize=["number"])
def _dropped(seed, number, mask, rows, columns, each, dropout, drop_path, BLOCK: tl.constexpr):
    key = number
    if seed is not None:
        key = tl.load(seed)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lost = tl.rand(key, places) < dropout
    # Of a seed of their own; a layer has fewer samples than entries.
    samples = places // columns // each
    lost = lost | (tl.rand(key ^ 0x5DEECE66D, samples) < drop_path)
    tl.store(mask + places, lost, mask=places < rows * columns)


def dropped(mask: Tensor, seed: Tensor | int, samples: int, dropout: float, drop_path: float) -> None:
    """Write true where the update's input is dropped.

    Args:
        mask: `(rows, columns)`, or `(rows, 1)` where only whole samples are dropped; boolean.
        seed: Of the numbers, at least 2^32; a tensor `()`, int64, where only the device knows it.
        samples: Which the rows belong to in turn.
        dropout: Probability of dropping an entry.
        drop_path: Probability of dropping a sample.
    """
    rows, columns = mask.shape
    each = rows // samples if samples else max(rows, 1)
    grid = (-(-mask.numel() // BLOCK),)
    seeds = (seed, 2**32) if isinstance(seed, Tensor) else (None, seed)
    _dropped[grid](*seeds, mask, rows, columns, each, dropout, drop_path if samples else 0.0, BLOCK=BLOCK)
