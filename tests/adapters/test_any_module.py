"""Models of other libraries than timm: the right layers, divided as they compute, trained, saved, loaded and merged."""

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snell_lightning.adapters import (
    AdapterSet,
    SnellConfig,
    adapter_parameters,
    adapter_state_dict,
    deltas,
    explain,
    inject,
    load_adapter_state_dict,
    merge,
    save_adapter,
)

DOCS = Path(__file__).parent.parent.parent / "docs" / "backbones.md"
CONFIG = SnellConfig(rank=4, sparsity=0.5, sparsifier="hard", scale=0.05, train_also=[])
HF = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(1))


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 16, 64, num_classes=3)


def torchvision_swin(version: int) -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    later = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    return SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=3, **later)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(2, (4, 8)), nn.Flatten(1, 3), nn.Linear(32, 16), nn.TransformerEncoder(layer, 2))


def transformers(kind: str, **settings: Any) -> nn.Module:
    import transformers as library

    config, model = kind.split()
    return getattr(library, model)(getattr(library, config)(**settings))


LLAMA = {"vocab_size": 40, "intermediate_size": 32, "num_key_value_heads": 1, "max_position_embeddings": 32}
Make = Callable[[], nn.Module]
# The model, what it is called with, the names that are adapted in a block, and of those that are divided the parts.
MODELS: dict[str, tuple[Make, Callable[[], Tensor], dict[str, int]]] = {
    "torchvision-vit": (
        torchvision_vit,
        images,
        {"self_attention.in_proj": 3, "self_attention.out_proj": 1, "mlp.0": 1, "mlp.3": 1},
    ),
    "torchvision-swin": (
        lambda: torchvision_swin(1),
        images,
        {"attn.qkv": 3, "attn.proj": 1, "mlp.0": 1, "mlp.3": 1},
    ),
    "torchvision-swin-v2": (
        lambda: torchvision_swin(2),
        images,
        {"attn.qkv": 3, "attn.proj": 1, "mlp.0": 1, "mlp.3": 1},
    ),
    "torch-encoder": (
        encoder,
        images,
        {"self_attn.in_proj": 3, "self_attn.out_proj": 1, "linear1": 1, "linear2": 1},
    ),
    "transformers-vit": (
        lambda: transformers("ViTConfig ViTForImageClassification", **HF, intermediate_size=32),
        images,
        {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 1, "fc1": 1, "fc2": 1},
    ),
    "transformers-dinov2": (
        lambda: transformers("Dinov2Config Dinov2Model", **HF),
        images,
        {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 1, "fc1": 1, "fc2": 1},
    ),
    "transformers-llama": (
        lambda: transformers(
            "LlamaConfig LlamaForCausalLM", **LLAMA, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
        ),
        tokens,
        {"q_proj": 1, "k_proj": 1, "v_proj": 1, "o_proj": 1, "gate_proj": 1, "up_proj": 1, "down_proj": 1},
    ),
}


def output(model: Any, x: Tensor) -> Tensor:
    found = model(x)
    if isinstance(found, Tensor):
        return found
    return found["logits"] if "logits" in found else found["last_hidden_state"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recompute", ["none", "inputs", "blocks"])
def test_a_model_of_another_library(name: str, recompute: str, caplog: pytest.LogCaptureFixture) -> None:
    make, example, parts = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        # Heads and scales that start at nothing would hide what lies before them.
        nn.init.uniform_(parameter, -0.3, 0.3)
    plain, x = copy.deepcopy(model), example()
    with torch.no_grad():
        expected = output(model, x)
    caplog.set_level(logging.WARNING)

    names = inject(model, SnellConfig(**{**vars(CONFIG), "recompute": recompute}))

    assert not [record for record in caplog.records if "competes as one" in record.message]
    found = {layer: len(model.get_submodule(layer).deltas) for layer in names}
    assert len(names) == (4 if "swin" in name else 2) * len(parts)
    assert {tuple(item) for item in found.items()} == {
        (layer, next(count for part, count in parts.items() if layer.endswith(part))) for layer in names
    }
    # What is the backbone's own keeps its names.
    adapters = {layer for layer, _ in adapter_parameters(model)}
    assert model.state_dict().keys() - adapters == plain.state_dict().keys()
    assert torch.allclose(output(model, x), expected, atol=1e-5)

    # Two steps, in which every adapter has a gradient.
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        output(model.train(), x).square().mean().backward()
        for layer, parameter in adapter_parameters(model):
            assert parameter.grad is not None, layer
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any(), layer
        optimizer.step()
    with torch.no_grad():
        tuned = output(model.eval(), x)
    assert not torch.allclose(tuned, expected, atol=1e-3)

    state = {key: tensor.clone() for key, tensor in adapter_state_dict(model).items()}
    again = make().eval()
    again.load_state_dict(plain.state_dict())
    inject(again, CONFIG)
    load_adapter_state_dict(again, state)
    with torch.no_grad():
        assert torch.allclose(output(again, x), tuned, atol=1e-6)
        merge(again)
        assert torch.allclose(output(again, x), tuned, atol=1e-4)
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in again.modules()] == [type(module) for module in plain.modules()]
    assert not any(module._forward_hooks for module in again.modules())


def test_what_the_docs_show(capsys: pytest.CaptureFixture[str]) -> None:
    section = DOCS.read_text().partition("## Models of other libraries")[2].partition("\n## ")[0]
    code, shown = re.findall(r"```(?:python)?\n(.*?)```", section, flags=re.DOTALL)

    exec(compile(code, str(DOCS), "exec"), {})

    assert capsys.readouterr().out.splitlines()[:3] == shown.splitlines()


def test_each_layer_has_its_reason() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.other = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=4)
            self.fc, self.conv, self.downsample = nn.Linear(8, 8), nn.Conv2d(8, 4, 3), nn.Sequential(nn.Linear(8, 4))

    model = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 4), "blocks": nn.Sequential(Block(), Block())})

    found = explain(model, SnellConfig(exclude=[r"1\.fc"]))

    inside = "it is in block blocks.0"
    assert {
        choice.name: (choice.adapted, choice.why) for choice in found if not choice.name.startswith("blocks.1.attn")
    } == {
        "stem": (False, "it is in no numbered block"),
        "blocks.0.attn.in_proj": (True, inside),
        "blocks.0.attn.out_proj": (True, inside),
        "blocks.0.fc": (True, inside),
        "blocks.0.conv": (False, "it is a 3x3 convolution; only 1x1 convolutions can be adapted"),
        "blocks.0.downsample.0": (False, "it is in downsample, which is not taken for part of a block"),
        "blocks.0.other.out_proj": (False, "nn.MultiheadAttention uses its weight without calling it"),
        "blocks.0.other.in_proj": (False, "its keys or values have another width than its queries"),
        "blocks.1.fc": (False, "exclude '1\\\\.fc' names it"),
        "blocks.1.conv": (False, "it is a 3x3 convolution; only 1x1 convolutions can be adapted"),
        "blocks.1.downsample.0": (False, "it is in downsample, which is not taken for part of a block"),
        "blocks.1.other.out_proj": (False, "nn.MultiheadAttention uses its weight without calling it"),
        "blocks.1.other.in_proj": (False, "its keys or values have another width than its queries"),
    }
    assert str(found[1]) == f"adapted blocks.0.attn.in_proj (8 -> 24): {inside}"
    assert type(model["blocks"][0].attn) is nn.MultiheadAttention
    with_targets = explain(model, SnellConfig(targets=["stem", "fc"]))
    assert [choice.why for choice in with_targets[:2]] == [
        "it is a 4x4 convolution; only 1x1 convolutions can be adapted",
        "no pattern of targets names it",
    ]


@pytest.mark.parametrize("name", ["torchvision-vit", "torchvision-swin-v2", "torch-encoder"])
def test_its_adapters_are_switched(name: str, tmp_path: Path) -> None:
    make, example, _ = MODELS[name]
    torch.manual_seed(0)
    backbone, x = make().eval(), example()
    for parameter in backbone.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3)
    expected = {}
    for number in range(2):
        model = copy.deepcopy(backbone)
        inject(model, CONFIG)
        for delta in deltas(model).values():
            nn.init.normal_(delta.in_factors)
            nn.init.normal_(delta.out_factors)
        save_adapter(tmp_path / f"{number}", model, CONFIG, name)
        with torch.no_grad():
            expected[str(number)] = output(model, x)
    with torch.no_grad():
        plain = output(backbone, x)

    several = AdapterSet(copy.deepcopy(backbone), name)
    for number in expected:
        several.load(tmp_path / number, number)
    for wanted in ("0", None, "1", "0"):
        several.put_on(wanted)
        with torch.no_grad():
            found = output(several.model, x)
        assert torch.allclose(found, plain if wanted is None else expected[wanted], atol=1e-4)
    several.put_on(None)
    assert several.model.state_dict().keys() == backbone.state_dict().keys()
    assert not any(module._forward_hooks for module in several.model.modules())
