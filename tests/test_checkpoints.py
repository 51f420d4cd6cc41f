"""A checkpoint file that is not as it was written is not read."""

import random
from pathlib import Path

import pytest
import torch

from snell_lightning.adapters import UserError
from snell_lightning.checkpoints import read_checkpoint, write_checkpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "some.ckpt"
    write_checkpoint({"weights": torch.arange(3000.0), "step": 3}, path)
    return path


def test_what_was_written_is_read_here_and_by_torch(path: Path) -> None:
    for read in (read_checkpoint(path), torch.load(path, weights_only=True), torch.load(path, mmap=True)):
        assert read["step"] == 3
        assert torch.equal(read["weights"], torch.arange(3000.0))
    assert [each.name for each in path.parent.iterdir()] == ["some.ckpt"]


def test_every_truncation_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    for length in [
        0,
        1,
        70,
        71,
        len(content) - 71,
        len(content) - 1,
        *random.Random(0).sample(range(len(content)), 30),
    ]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="is damaged"):
            read_checkpoint(path)


def test_every_flipped_bit_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    places = [0, len(content) - 1, len(content) - 71, *random.Random(0).sample(range(len(content)), 60)]
    for place in places:
        altered = bytearray(content)
        altered[place] ^= 1 << place % 8
        path.write_bytes(altered)
        with pytest.raises(UserError, match="is damaged"):
            read_checkpoint(path)


def test_torch_alone_notices_no_flipped_weight(path: Path) -> None:
    # The reason for the sum: if this fails one day, torch has begun to look.
    content = bytearray(path.read_bytes())
    content[content.index(torch.tensor([1000.0]).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["weights"][1000] != 1000
