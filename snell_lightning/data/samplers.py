"""Which images each process evaluates.

`torch.utils.data.DistributedSampler` repeats images until every process has the same number, which shifts the
metrics; here each image belongs to exactly one process. Example with 5 images and 2 processes: rank 0 gets 0,
2, 4 and rank 1 gets 1, 3.
"""

from collections.abc import Iterator, Sized

from torch.utils.data import DistributedSampler


class ShardSampler(DistributedSampler):
    """Every `num_replicas`-th index from `rank` on, in order, without padding.

    It is a `DistributedSampler` so that lightning leaves it in place instead of wrapping it in one of its
    own, which would shard the shard.

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
