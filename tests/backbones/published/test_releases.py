"""Weights as the authors of models release them, or as training leaves them: the logits are those of the source.

The source is a timm model whose tensors are written under the names that these files have.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from snell_lightning.adapters import UserError
from snell_lightning.backbones.published import load_weights
from tests.backbones.published.models import CONVNEXT, HIERA, SWIN, VIT, features, images, lively, made, renamed


class TestReleases:
    """Forms in which the authors' own weights come."""

    def check(
        self, name: str, arguments: dict[str, Any], content: Any, path: Path, source: nn.Module, **kept: Any
    ) -> Any:
        torch.save(content, path)
        model = made(name, **arguments)
        loaded = load_weights(model, path, name)
        x = images(arguments.get("img_size", 32))
        assert torch.allclose(features(model, x), features(source, x), atol=1e-5)
        for what, value in kept.items():
            assert getattr(loaded, what) == value
        return loaded

    def test_mae(self, tmp_path: Path) -> None:
        source = lively(made("vit_base_patch16_224", **VIT, num_classes=0))
        state = renamed(source) | {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
        state |= {"decoder_blocks.0.norm1.weight": torch.zeros(8)}

        loaded = self.check("vit_base_patch16_224", VIT, {"model": state}, tmp_path / "w.pth", source, place="model")

        assert loaded.new == ("head.bias", "head.weight")
        assert loaded.left == ("decoder_blocks.0.norm1.weight", "decoder_pos_embed")
        assert not loaded.changed

    def test_moco_v3(self, tmp_path: Path) -> None:
        source = lively(made("vit_base_patch16_224", **VIT))
        other = lively(made("vit_base_patch16_224", **VIT, num_classes=7))
        state = renamed(source, prefix="module.base_encoder.")
        state |= {name: tensor + 1 for name, tensor in renamed(other, prefix="module.momentum_encoder.").items()}
        content = {"epoch": 300, "arch": "vit_base", "state_dict": state, "optimizer": {"state": {0: torch.ones(2)}}}

        self.check(
            "vit_base_patch16_224", VIT, content, tmp_path / "w.tar", source, place="state_dict: module.base_encoder."
        )

    def test_dino_with_student_teacher_and_arguments(self, tmp_path: Path) -> None:
        import argparse

        source = lively(made("vit_base_patch16_224", **VIT, num_classes=0))
        teacher = renamed(source, prefix="backbone.")
        student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
        head = {"head.mlp.0.weight": torch.zeros(4, 16)}
        content = {"student": student | head, "teacher": teacher | head, "args": argparse.Namespace(lr=1), "epoch": 3}

        self.check("vit_base_patch16_224", VIT, content, tmp_path / "w.pth", source, place="teacher: backbone.")

    @pytest.mark.parametrize("registers", [0, 4])
    def test_dinov2(self, registers: int, tmp_path: Path) -> None:
        arguments = {**VIT, "reg_tokens": registers, "no_embed_class": registers > 0, "init_values": 1.0}
        source = lively(made("vit_base_patch16_224", **arguments, num_classes=0))
        state = renamed(source, (r"^reg_token$", "register_tokens"))
        if registers:
            # Meta's models add a position to the class token; timm's hold the sum.
            first = torch.randn(1, 1, 16)
            state["cls_token"] -= first
            state["pos_embed"] = torch.cat([first, state["pos_embed"]], 1)
        state["mask_token"] = torch.zeros(1, 16)

        self.check("vit_base_patch16_224", arguments, state, tmp_path / "w.pth", source, left=())

    def test_dinov3(self, tmp_path: Path) -> None:
        name = "vit_small_patch16_dinov3_qkvb"
        source = lively(made(name, **VIT, num_classes=0))
        state = renamed(source, (r"^reg_token$", "storage_tokens"), (r"gamma_([12])$", r"ls\1.gamma"))
        for number in range(2):
            around = f"blocks.{number}.attn."
            query, value = state.pop(f"{around}q_bias"), state.pop(f"{around}v_bias")
            state[f"{around}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
            state[f"{around}qkv.bias_mask"] = torch.ones(48)
        state |= {"mask_token": torch.zeros(1, 16), "rope_embed.periods": torch.ones(2)}

        self.check(name, VIT, state, tmp_path / "w.pth", source, left=())

    @pytest.mark.parametrize(
        ("name", "arguments", "rules", "place", "extra"),
        [
            (
                "swinv2_tiny_window8_256",
                SWIN,
                ((r"^layers\.1\.downsample", "layers.0.downsample"),),
                "model",
                "attn_mask",
            ),
            ("beit_base_patch16_224", {**VIT, "init_values": 0.1}, (), "model", "attn.relative_position_index"),
            ("eva02_tiny_patch14_224", VIT, (), "module", "attn.rope.freqs_cos"),
            (
                "hiera_tiny_224",
                HIERA,
                ((r"^head\.norm", "encoder_norm"), (r"^head\.fc", "head.projection")),
                "model_state",
                "",
            ),
        ],
    )
    def test_of_the_same_names(
        self, name: str, arguments: Any, rules: Any, place: str, extra: str, tmp_path: Path
    ) -> None:
        source = lively(made(name, **arguments))
        state = renamed(source, *rules)
        if extra:
            # What the model's own code computes, and the file has all the same.
            block = "layers.0.blocks.0." if "swin" in name else "blocks.0."
            state[block + extra] = torch.zeros(3)

        self.check(name, arguments, {place: state}, tmp_path / "w.pt", source)

    def test_deit3(self, tmp_path: Path) -> None:
        arguments = {**VIT, "init_values": 1.0, "no_embed_class": True}
        source = lively(made("deit3_small_patch16_224", **arguments))
        state = renamed(source, (r"ls([12])\.gamma", r"gamma_\1"))

        self.check("deit3_small_patch16_224", arguments, {"model": state}, tmp_path / "w.pth", source, left=())

    def test_swin(self, tmp_path: Path) -> None:
        source = lively(made("swin_tiny_patch4_window7_224", **SWIN))
        # Its authors downsample at the end of a stage, timm at the start of the next.
        state = renamed(source, (r"^layers\.1\.downsample", "layers.0.downsample"), (r"^head\.fc\.", "head."))
        state |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(64, 64, dtype=torch.long)}
        state |= {"layers.0.blocks.0.attn_mask": torch.zeros(4, 64, 64)}

        loaded = self.check("swin_tiny_patch4_window7_224", SWIN, {"model": state}, tmp_path / "w.pth", source)

        assert not loaded.new

    @pytest.mark.parametrize("version", [1, 2])
    def test_convnext(self, version: int, tmp_path: Path) -> None:
        name = f"convnext{'' if version == 1 else 'v2'}_tiny"
        source = lively(made(name, **CONVNEXT))
        state = renamed(
            source,
            (r"^stem\.", "downsample_layers.0."),
            (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
            (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
            (r"conv_dw", "dwconv"),
            (r"mlp\.fc([12])", r"pwconv\1"),
            (r"mlp\.grn\.weight", "grn.gamma"),
            (r"mlp\.grn\.bias", "grn.beta"),
            (r"^head\.norm\.", "norm."),
            (r"^head\.fc\.", "head."),
        )
        state = {key: tensor[None, None, None] if "grn" in key else tensor for key, tensor in state.items()}

        self.check(name, CONVNEXT, {"model": state}, tmp_path / "w.pth", source, left=())

    def test_openai_clip(self, tmp_path: Path) -> None:
        name, arguments = "vit_base_patch32_clip_224", {**VIT}
        source = lively(made(name, **arguments))
        state = renamed(
            source,
            (r"^patch_embed\.proj", "conv1"),
            (r"^pos_embed$", "positional_embedding"),
            (r"^cls_token$", "class_embedding"),
            (r"^norm_pre", "ln_pre"),
            (r"^norm\.", "ln_post."),
            (r"^blocks\.(\d+)\.norm", r"transformer.resblocks.\1.ln_"),
            (r"^blocks\.", "transformer.resblocks."),
            (r"attn\.qkv\.", "attn.in_proj_"),
            (r"attn\.proj", "attn.out_proj"),
            (r"mlp\.fc1", "mlp.c_fc"),
            (r"mlp\.fc2", "mlp.c_proj"),
            prefix="visual.",
        )
        state = {key: tensor for key, tensor in state.items() if not key.startswith("visual.head")}
        state["visual.class_embedding"] = state["visual.class_embedding"][0, 0]
        state["visual.positional_embedding"] = state["visual.positional_embedding"][0]
        state |= {"text_projection": torch.zeros(8, 8), "transformer.resblocks.0.ln_1.weight": torch.zeros(8)}

        self.check(name, arguments, state, tmp_path / "w.pt", source)
        save_file(state, tmp_path / "w.safetensors")
        assert load_weights(made(name, **arguments), tmp_path / "w.safetensors", name).new

    def test_openclip_with_a_timm_tower(self, tmp_path: Path) -> None:
        name = "vit_base_patch16_siglip_224"
        source = lively(made(name, **VIT))
        state = renamed(source, prefix="visual.trunk.") | {"text.token_embedding.weight": torch.zeros(8, 8)}

        self.check(name, VIT, {"state_dict": state}, tmp_path / "w.bin", source)

    def test_lightning_checkpoint(self, tmp_path: Path) -> None:
        source = lively(made("resnet18"))
        content = {
            "pytorch-lightning_version": "2.6.6",
            "state_dict": renamed(source, prefix="net.") | {"criterion.weight": torch.ones(3)},
            "optimizer_states": [{"state": {}}],
            "hyper_parameters": {"path": Path("x")},
        }

        self.check("resnet18", {}, content, tmp_path / "w.ckpt", source, new=(), place="state_dict: net.")

    def test_a_running_average_is_preferred(self, tmp_path: Path) -> None:
        source, other = lively(made("vit_base_patch16_224", **VIT)), made("vit_base_patch16_224", **VIT)
        content = {"state_dict": other.state_dict(), "state_dict_ema": source.state_dict()}

        self.check("vit_base_patch16_224", VIT, content, tmp_path / "w.pth.tar", source, place="state_dict_ema")

    def test_the_older_form_of_pytorch_files(self, tmp_path: Path) -> None:
        source, model = lively(made("resnet18")), made("resnet18")
        torch.save(source.state_dict(), tmp_path / "w", _use_new_zipfile_serialization=False)

        load_weights(model, tmp_path / "w", "resnet18")

        assert torch.equal(features(model, images()), features(source, images()))


def google(model: Any) -> dict[str, np.ndarray]:
    """A ViT's tensors as Google's JAX code names and lays them out."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    width, heads = state["cls_token"].shape[-1], model.blocks[0].attn.num_heads
    found = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for number in range(len(model.blocks)):
        own, theirs = f"blocks.{number}.", f"Transformer/encoderblock_{number}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for place, part in enumerate(("query", "key", "value")):
            rows = slice(place * width, (place + 1) * width)
            found[f"{attention}{part}/kernel"] = state[f"{own}attn.qkv.weight"][rows].T.reshape(width, heads, -1)
            found[f"{attention}{part}/bias"] = state[f"{own}attn.qkv.bias"][rows].reshape(heads, -1)
        found[f"{attention}out/kernel"] = state[f"{own}attn.proj.weight"].T.reshape(heads, -1, width)
        found[f"{attention}out/bias"] = state[f"{own}attn.proj.bias"]
        for place, norm in ((0, "norm1"), (2, "norm2")):
            found[f"{theirs}LayerNorm_{place}/scale"] = state[f"{own}{norm}.weight"]
            found[f"{theirs}LayerNorm_{place}/bias"] = state[f"{own}{norm}.bias"]
        for place, layer in enumerate(("fc1", "fc2")):
            found[f"{theirs}MlpBlock_3/Dense_{place}/kernel"] = state[f"{own}mlp.{layer}.weight"].T
            found[f"{theirs}MlpBlock_3/Dense_{place}/bias"] = state[f"{own}mlp.{layer}.bias"]
    return found


class TestGoogle:
    def test_vit(self, tmp_path: Path) -> None:
        source, model = lively(made("vit_base_patch16_224", **VIT)), made("vit_base_patch16_224", **VIT)
        # Whatever the file is called.
        with (tmp_path / "weights").open("wb") as file:
            np.savez(file, **google(source))

        loaded = load_weights(model, tmp_path / "weights", "vit_base_patch16_224")

        with torch.no_grad():
            assert torch.allclose(model(images()), source(images()), atol=1e-5)
        assert not loaded.new

    def test_other_classes_get_a_fresh_head(self, tmp_path: Path) -> None:
        source, model = lively(made("vit_base_patch16_224", **VIT)), made("vit_base_patch16_224", **VIT, num_classes=5)
        np.savez(tmp_path / "w.npz", **google(source))
        head = model.head.weight.clone()

        loaded = load_weights(model, tmp_path / "w.npz", "vit_base_patch16_224")

        assert loaded.new == ("head.bias", "head.weight")
        assert torch.equal(model.head.weight, head)
        assert torch.allclose(features(model, images()), features(source, images()), atol=1e-5)

    @pytest.mark.parametrize(
        ("arguments", "message"), [({"depth": 3}, "2 blocks"), ({"embed_dim": 24}, "does not fit")]
    )
    def test_another_architecture_is_refused(self, arguments: dict[str, int], message: str, tmp_path: Path) -> None:
        np.savez(tmp_path / "w.npz", **google(made("vit_base_patch16_224", **VIT)))

        with pytest.raises(UserError, match=message):
            load_weights(made("vit_base_patch16_224", **{**VIT, **arguments}), tmp_path / "w.npz", "vit")
