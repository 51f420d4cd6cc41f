"""Dropout and drop path of an update: probabilities and a seed, from which both masks are made again in backward."""

from dataclasses import dataclass

import torch
from torch import Tensor

from snell_lightning.adapters.update import triton


@dataclass(frozen=True)
class Noise:
    """Regularisation of an update during training: nothing but probabilities and a seed is stored.

    Attributes:
        dropout: Probability of dropping an entry of the update's input; kept to 1/65536.
        drop_path: Probability of dropping a sample's whole update.
        seed: Rebuilds both masks in backward; as a tensor `()` on the device where only a graph knows it.
    """

    dropout: float
    drop_path: float
    seed: int | Tensor

    @classmethod
    def draw(cls, dropout: float, drop_path: float) -> "Noise | None":
        """Noise for one forward, seeded from the main generator on the CPU; `None` where both probabilities are 0."""
        if not dropout and not drop_path:
            return None
        return cls(dropout, drop_path, draw_seed())

    @property
    def _cut(self) -> int:
        """How many of the 65536 values of 16 random bits drop an entry."""
        return min(round(self.dropout * 2**16), 2**16 - 1)

    @property
    def scale(self) -> float:
        """What the update is multiplied with, so that its mean stays."""
        return 1 / ((1 - self._cut / 2**16) * (1 - self.drop_path))

    def _by_program(self, device: torch.device) -> bool:
        return device.type in triton.DEVICES and triton.usable(device)

    def _generator(self, device: torch.device) -> torch.Generator:
        seed = self.seed if isinstance(self.seed, int) else int(self.seed.item())
        return torch.Generator(device).manual_seed(seed)

    def dropped_entries(self, rows: int, columns: int, device: torch.device) -> Tensor | None:
        """A mask `(rows, columns)`, true where the update's input is dropped; None without dropout."""
        if not self._cut:
            return None
        generator = self._generator(device)
        # One 64-bit draw makes four entries: drawing is what a mask costs.
        draws = torch.empty((rows * columns + 3) // 4, dtype=torch.int64, device=device)
        bits = draws.random_(-(2**63), 2**63 - 1, generator=generator).view(torch.int16)
        return (bits[: rows * columns] < self._cut - 2**15).view(rows, columns)

    def dropped(self, rows: int, columns: int, samples: int, device: torch.device) -> Tensor | None:
        """A mask `(rows, columns)` or `(rows, 1)`, true where the update's input is dropped, entry or whole sample.

        For devices whose numbers the host does not know. By torch's operations the samples are those of `row_ranges`.

        Args:
            rows: Of the input.
            columns: Of the input.
            samples: Which the rows belong to in turn.
            device: Where the mask is made.
        """
        if self._by_program(device):
            mask = torch.empty(rows, columns if self._cut else 1, dtype=torch.bool, device=device)
            seeds = (self.seed, None) if isinstance(self.seed, Tensor) else (None, self.seed)
            torch.ops.snell.dropped(mask, *seeds, samples, self._cut / 2**16, self.drop_path)
            return mask
        entries = self.dropped_entries(rows, columns, device)
        if not self.drop_path or not samples:
            return entries
        generator = self._generator(device)
        lost = torch.rand(samples, generator=generator, device=device) < self.drop_path
        lost = lost[:, None].expand(samples, rows // samples).reshape(rows, 1)
        return lost if entries is None else entries.logical_or_(lost)

    def row_ranges(self, rows: int, samples: int) -> tuple[list[slice], list[slice]]:
        """Rows of kept samples and of dropped ones, of `rows` that belong to `samples` in turn; known to the host."""
        if not self.drop_path or not samples:
            return [slice(0, rows)], []
        generator = self._generator(torch.device("cpu"))
        kept = (torch.rand(samples, generator=generator) >= self.drop_path).tolist()
        ranges: tuple[list[slice], list[slice]] = [], []
        each, start = rows // samples, 0
        for sample in range(1, samples + 1):
            if sample == samples or kept[sample] != kept[start]:
                ranges[0 if kept[start] else 1].append(slice(start * each, sample * each))
                start = sample
        return ranges


def draw_seed() -> int:
    """A seed for one forward, from the main generator on the CPU."""
    return int(torch.randint(2**32, 2**63 - 1, ()).item())
