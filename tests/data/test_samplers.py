"""Evaluation shards cover every image exactly once."""

import pytest

from snell_lightning.data.samplers import ShardSampler


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("images", [0, 1, 3, 8, 11])
def test_each_image_belongs_to_exactly_one_process(world: int, images: int) -> None:
    shards = [ShardSampler(range(images), world, rank) for rank in range(world)]
    assert sorted(index for shard in shards for index in shard) == list(range(images))
    for rank, shard in enumerate(shards):
        assert list(shard) == list(range(images))[rank::world]
        assert len(shard) == len(list(shard))
        assert shard.longest_shard == len(shards[0])
