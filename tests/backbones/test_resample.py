"""Positions learned for one image size, in another: a pattern that is straight stays so, in every layout."""

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from snell_lightning.backbones import create_backbone
from snell_lightning.backbones.published import load_weights
from snell_lightning.backbones.resample import fit, resampled

PLAIN = nn.Module()


def ramp(side: int, width: int = 3) -> Tensor:
    """Values `(side, side, width)` that grow by 1 from the top to the bottom of the image."""
    return torch.linspace(0, 1, side)[:, None, None].expand(side, side, width).contiguous()


def is_ramp(values: Tensor) -> bool:
    """Whether `(side, side, width)` grow from about 0 to about 1, alike in every column."""
    column = values[:, :1]
    return bool(torch.allclose(values, column.expand_as(values), atol=1e-4) and (column.diff(dim=0) > 0).all()) and (
        abs(float(values[0].mean())) < 0.1 and abs(float(values[-1].mean()) - 1) < 0.1
    )


def test_tokens_before_the_positions_stay_as_they_are() -> None:
    model = nn.Module()
    model.num_prefix_tokens = 2
    first = torch.full((1, 2, 3), 7.0)
    given = torch.cat([first, ramp(4).view(1, 16, 3)], 1)

    made = resampled("pos_embed", given, model, torch.Size((1, 38, 3)))

    assert torch.equal(made[:, :2], first)
    assert is_ramp(made[0, 2:].view(6, 6, 3))


def test_grids_with_channels_first_and_last() -> None:
    first = resampled("pos_embed", ramp(4).permute(2, 0, 1)[None], PLAIN, torch.Size((1, 3, 7, 7)))
    last = resampled("pos_embed", ramp(4)[None], PLAIN, torch.Size((1, 7, 7, 3)))

    assert is_ramp(first[0].permute(1, 2, 0))
    assert torch.allclose(last[0], first[0].permute(1, 2, 0), atol=1e-6)


def test_a_grid_in_blocks_is_resampled_across_them() -> None:
    # NesT: 2 x 2 blocks of 2 x 2 places each.
    blocks = ramp(4).view(2, 2, 2, 2, 3).permute(0, 2, 1, 3, 4).reshape(1, 4, 4, 3)

    made = resampled("levels.0.pos_embed", blocks, PLAIN, torch.Size((1, 4, 9, 3)))

    assert is_ramp(made.view(2, 2, 3, 3, 3).permute(0, 2, 1, 3, 4).reshape(6, 6, 3))


def test_tables_of_distances_keep_their_ends() -> None:
    rows = resampled("attn.attention_biases", ramp(4, 2).view(16, 2).T, PLAIN, torch.Size((2, 36)))
    columns = resampled("attn.relative_position_bias_table", ramp(3, 2).view(9, 2), PLAIN, torch.Size((25, 2)))
    line = resampled("pos_embed.height_rel", torch.linspace(0, 1, 5)[:, None], PLAIN, torch.Size((9, 1)))

    assert is_ramp(rows.T.view(6, 6, 2))
    assert is_ramp(columns.view(5, 5, 2))
    assert float(columns[0, 0]) == 0
    assert (line.diff(dim=0) >= 0).all()


def test_what_is_no_position_is_left_alone() -> None:
    assert resampled("blocks.0.mlp.fc1.weight", torch.zeros(4, 16), PLAIN, torch.Size((4, 36))) is None
    assert resampled("pos_embed", torch.zeros(1, 16, 3), PLAIN, torch.Size((1, 36, 4))) is None
    assert resampled("pos_embed", torch.zeros(1, 15, 3), PLAIN, torch.Size((1, 36, 3))) is None


def test_to_the_same_size_nothing_changes() -> None:
    model = timm.create_model("levit_128s", num_classes=3)
    state = model.state_dict()

    assert all(fit(state, model)[name] is tensor for name, tensor in state.items())


def test_a_model_that_timm_does_not_resample_takes_pretrained_weights_in_another_size(tmp_path: Path) -> None:
    source = timm.create_model("levit_128s", num_classes=5)
    save_model(source, str(tmp_path / "model.safetensors"))
    known = {**source.pretrained_cfg, "num_classes": 5}
    config = {"architecture": "levit_128s", "num_classes": 5, "pretrained_cfg": known}
    (tmp_path / "config.json").write_text(json.dumps(config))

    model = create_backbone(f"local-dir:{tmp_path}", 3, image_size=256)

    second = create_backbone("levit_128s", 3, False, 256)
    load_weights(second, tmp_path / "model.safetensors", "levit_128s")
    state = {name: tensor for name, tensor in second.state_dict().items() if "head" not in name}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    # A distance of nothing is one at every size.
    place = "stages.0.blocks.0.attn.attention_biases"
    assert torch.allclose(model.state_dict()[place][:, 0], source.state_dict()[place][:, 0])
    assert model.eval()(torch.randn(1, 3, 256, 256)).isfinite().all()
