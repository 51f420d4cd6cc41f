"""A small model of each of timm's modules takes the sizes of images that docs/backbones.md says."""

import pytest

from benchmarks.backbones import Row, read_table
from snell_lightning.adapters import UserError
from snell_lightning.backbones.resample import fit

ROWS = read_table()
pytestmark = pytest.mark.backbones


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.module)
def test_takes_the_sizes_that_the_table_says(row: Row) -> None:
    own = row.create().state_dict()
    for name, size in row.other_sizes().items():
        if name not in row.sizes:
            with pytest.raises(UserError, match=f"does not take images of {size[0]} x {size[1]} pixels") as caught:
                row.resized(size)
            assert len(str(caught.value).splitlines()) == 1
            continue
        model = row.resized(size)
        # What was learned at one size goes over into squares of another; gMLP and Mixer mix over a number of tokens.
        if name == "squares" and row.module != "mlp_mixer":
            model.load_state_dict({**model.state_dict(), **fit(own, model)})
