"""Which images each process trains on and evaluates, and in which order.

Both are `DistributedSampler`s so that lightning leaves them in place instead of wrapping them in one of its own, which
would shard the shard.
"""

from collections.abc import Iterator, Sequence, Sized

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

# Files whose images are shuffled together.
_AT_ONCE = 16


class TrainSampler(DistributedSampler):
    """All images in an order that seed and epoch alone decide, dealt out to the processes in turn.

    The epoch's last round is filled up with images of its beginning, so that every process has as many. What comes out
    is `epoch * images + index`, which counts on through the epochs: whoever opens an image learns from its number alone
    in which epoch that is, and can draw the same random numbers wherever and whenever it does.

    Args:
        dataset: The data set; only its length is used.
        num_replicas: Number of processes.
        rank: This process, from 0 to `num_replicas - 1`.
        seed: Of the order.
        shards: Images that lie in a row, in files of so many each: they are shuffled 16 files at a time, in an order of
            files that is another one in every epoch. By default all images are shuffled at once.

    Attributes:
        done: Images at the beginning of the epoch, over all processes, that are left out: the epoch was broken off
            there.
        taken: Images that have been taken since.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int, seed: int, shards: Sequence[int] = ()) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.images, self.shards = len(dataset), shards
        self.done = self.taken = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; another one than the present one is begun at its beginning."""
        if epoch != self.epoch:
            self.done = self.taken = 0
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        """Numbers of this process's images that are left of the epoch."""
        order = self._order().tolist()
        rest = order[self.done :]
        while missing := -len(rest) % self.num_replicas:
            rest += order[:missing]
        return (self.epoch * self.images + index for index in rest[self.rank :: self.num_replicas])

    def _order(self) -> Tensor:
        """The epoch's order of all images."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if not self.shards:
            return torch.randperm(self.images, generator=generator)
        shards = torch.arange(self.images).split(list(self.shards))
        turn = torch.randperm(len(shards), generator=generator).tolist()
        parts = []
        for start in range(0, len(turn), _AT_ONCE):
            part = torch.cat([shards[shard] for shard in turn[start : start + _AT_ONCE]])
            parts.append(part[torch.randperm(len(part), generator=generator)])
        return torch.cat(parts)

    def __len__(self) -> int:
        """How many this process has in a whole epoch."""
        return -(-self.images // self.num_replicas)


class ShardSampler(DistributedSampler):
    """Every `num_replicas`-th index from `rank` on, in order, without padding.

    A plain `DistributedSampler` repeats images until every process has the same number, which shifts the metrics; here
    each image belongs to exactly one process. Of 5 images and 2 processes the first gets 0, 2, 4 and the second 1, 3.

    Args:
        dataset: The data set; only its length is used.
        num_replicas: Number of processes.
        rank: This process, from 0 to `num_replicas - 1`.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.total_size = len(dataset)
        self.num_samples = len(self._indices())

    @property
    def longest_shard(self) -> int:
        """Length of the longest shard of any process, which is rank 0's."""
        return -(-self.total_size // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        """Indices of this process's images."""
        return iter(self._indices())

    def __len__(self) -> int:
        """Number of this process's images."""
        return self.num_samples

    def _indices(self) -> range:
        return range(self.rank, self.total_size, self.num_replicas)
