"""Tensors under the names of other libraries, renamed to those that timm has or knows how to read.

Of Hugging Face transformers: ViT, DeiT, ViT-MAE, BEiT, DINOv2 (with registers or without), DINOv3, CLIP, SigLIP, Swin
v1 and v2, ConvNeXt v1 and v2; of torchvision: ViT. The releases of the models' own authors are read by timm's filters.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

# Applied to a name one after the other, the first match of each.
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        # ViT and its kin.
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
        (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
        (r"^embeddings\.class_embedding$", "cls_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^encoder\.layers?\.(\d+)\.(?!blocks|downsample)", r"blocks.\1."),
        (r"^encoder\.(layers\.\d+\.(blocks|downsample)\.)", r"\1"),
        (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
        (r"\.(attention\.attention|attention\.self|self_attn)\.", ".attn."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.attn\.query\.", ".attn.q."),
        (r"\.attn\.key\.", ".attn.k."),
        (r"\.attn\.value\.", ".attn.v."),
        (r"\.attn\.([qkv])_proj\.", r".attn.\1."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.attn\.continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layernorm_before\.|\.layer_norm1\.", ".norm1."),
        (r"\.layernorm_after\.|\.layer_norm2\.", ".norm2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.lambda_([12])$", r".gamma_\1"),
        (r"\.mlp\.weights_in\.", ".mlp.w12."),
        (r"\.mlp\.weights_out\.", ".mlp.w3."),
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^(post_)?layernorm\.", "norm."),
        (r"^pooler\.layernorm\.", "fc_norm."),
        (r"^head\.probe$", "attn_pool.latent"),
        (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"^head\.attention\.", "attn_pool."),
        (r"^head\.layernorm\.", "attn_pool.norm."),
        (r"^head\.mlp\.", "attn_pool.mlp."),
        # DINOv3.
        (r"^embeddings\.patch_embeddings\.(?=weight$|bias$)", "patch_embed.proj."),
        (r"^layer\.(\d+)\.attention\.([qkv])_proj\.", r"blocks.\1.attn.\2."),
        (r"^layer\.(\d+)\.attention\.o_proj\.", r"blocks.\1.attn.proj."),
        (r"^layer\.(\d+)\.mlp\.up_proj\.", r"blocks.\1.mlp.fc1."),
        (r"^layer\.(\d+)\.mlp\.down_proj\.", r"blocks.\1.mlp.fc2."),
        (r"^layer\.(\d+)\.", r"blocks.\1."),
        # torchvision's ViT.
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^class_token$", "cls_token"),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.ln\.", "norm."),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"^(blocks\.\d+)\.ln_([12])\.", r"\1.norm\2."),
        (r"^(blocks\.\d+\.mlp)\.(0|linear_1)\.", r"\1.fc1."),
        (r"^(blocks\.\d+\.mlp)\.(3|linear_2)\.", r"\1.fc2."),
        (r"^heads\.head\.", "head."),
    ]
]
# Under these the authors' own release has them, which timm reads.
_CONVNEXT = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
        (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
        (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"downsample_layers.\1."),
        (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1."),
        (r"\.layernorm\.", ".norm."),
        (r"\.layer_scale_parameter$", ".gamma"),
        (r"\.grn\.weight$", ".grn.gamma"),
        (r"\.grn\.bias$", ".grn.beta"),
        (r"^layernorm\.", "norm."),
    ]
]
_PREFIX_PARTS = 3


def prefixes(names: Iterable[str]) -> list[str]:
    """What may stand before all names of a model in a file, short ones first: `""`, `module.`, `module.encoder.`."""
    found = {""}
    for name in names:
        prefix = ""
        for part in name.split(".")[:-1][:_PREFIX_PARTS]:
            if part.isdigit():
                break
            prefix += part + "."
            found.add(prefix)
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def to_timm(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under names that timm's own filters read, q, k and v in one where the model has them so.

    Args:
        tensors: By the names that a file has, without what stands before all of them.
        own: The model's tensors by name.
    """
    rules = (
        _CONVNEXT if any(".dwconv." in name and name.startswith("encoder.stages.") for name in tensors) else _RENAMES
    )
    renamed = {}
    for name, tensor in tensors.items():
        renamed[_renamed(name, rules)] = tensor
    if any(name.startswith("layer.0.attention.") for name in tensors) and "register_tokens" in renamed:
        # DINOv3, by its authors' name.
        renamed["storage_tokens"] = renamed.pop("register_tokens")
    if "embeddings.class_embedding" in tensors:
        renamed["cls_token"] = renamed["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in renamed and renamed["pos_embed"].ndim == 2:
        renamed["pos_embed"] = renamed["pos_embed"].unsqueeze(0)
    return dict(_pooled(_fused(renamed, own)))


def _renamed(name: str, rules: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        name = pattern.sub(replacement, name, count=1)
    return name


def _fused(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v in one layer where the model has one, and deit3's scales in modules where it has these."""
    fused = dict(tensors)
    for name in tensors:
        around = name.removesuffix("q.weight")
        if (
            name.endswith(".attn.q.weight")
            and {f"{around}k.weight", f"{around}v.weight"} <= tensors.keys() - own.keys()
        ):
            fused[f"{around}qkv.weight"] = torch.cat([fused.pop(f"{around}{part}.weight") for part in "qkv"])
            biases = {part: fused.pop(f"{around}{part}.bias", None) for part in "qkv"}
            if biases["q"] is None or biases["v"] is None:
                continue
            if biases["k"] is None and f"{around}q_bias" in own:
                fused[f"{around}q_bias"], fused[f"{around}v_bias"] = biases["q"], biases["v"]
            else:
                key = torch.zeros_like(biases["q"]) if biases["k"] is None else biases["k"]
                fused[f"{around}qkv.bias"] = torch.cat([biases["q"], key, biases["v"]])
        scale = re.fullmatch(r"(.*)\.gamma_([12])", name)
        if scale and name not in own and f"{scale[1]}.ls{scale[2]}.gamma" in own:
            fused[f"{scale[1]}.ls{scale[2]}.gamma"] = fused.pop(name)
    return fused


def _pooled(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """SigLIP's pooling has q, k and v in one, where timm has q, and k with v."""
    for name, tensor in tensors.items():
        pooling = re.fullmatch(r"attn_pool\.in_proj_(weight|bias)", name)
        if pooling:
            width = len(tensor) // 3
            yield f"attn_pool.q.{pooling[1]}", tensor[:width]
            yield f"attn_pool.kv.{pooling[1]}", tensor[width:]
        else:
            yield name, tensor
