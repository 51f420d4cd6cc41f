"""The model card of a merged model: a README.md with the metadata that model hubs read."""

from typing import Any

import yaml

from snell_lightning.backbones.sizes import pixels
from snell_lightning.data.splits import PUBLISHED
from snell_lightning.inference.classifier import Classifier

_USE = {
    "timm": """import timm
model = timm.create_model("local-dir:PATH", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))""",
    "onnx": """import onnxruntime
session = onnxruntime.InferenceSession("PATH/model.onnx")
logits = session.run(["logits"], {"images": images})[0]  # images: float32, as below""",
    "torch_export": """import torch
model = torch.export.load("PATH/model.pt2").module()
logits = model(images)  # images: float32, as below""",
}
_SCORES = {"acc1": "accuracy", "acc5": "top-5 accuracy", "loss": "loss"}


def model_card(tuned: Classifier, format_name: str, precision: str, difference: float, images: int) -> str:
    """The text.

    Args:
        tuned: The merged classifier.
        format_name: `timm`, `onnx` or `torch_export`.
        precision: Type of the stored weights.
        difference: Largest difference of a logit from the tuned model's.
        images: On how many images.
    """
    values = tuned.metadata
    base = _base_model(tuned)
    published = values.get("protocol") == "published"
    scored_as = "test_by_epoch" if published else "val"
    scores = {name: values[f"{scored_as}/{key}"] for key, name in _SCORES.items() if f"{scored_as}/{key}" in values}
    facts: dict[str, Any] = {
        "library_name": format_name if format_name != "torch_export" else "pytorch",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "snell", "timm"],
    }
    if base is not None:
        facts |= {"base_model": base, "base_model_relation": "finetune"}
    if "accuracy" in scores:
        facts["metrics"] = ["accuracy"]
    adapter = values["config"]
    how = (
        "Its head alone was trained (a linear probe)."
        if adapter is None
        else f"It was tuned with SNELL (rank {adapter['rank']}, sparsity {adapter['sparsity']}), and the updates are "
        "added to the weights: nothing but the plain model is needed."
    )
    mean, std = (", ".join(f"{value:.4g}" for value in values["normalization"][key]) for key in ("mean", "std"))
    crop, size = values["crop_pct"], pixels(tuned.image_size)
    resized = (
        f"resized whole to {size} pixels"
        if crop is None
        else f"resized in its proportions to cover {pixels([int(side / crop) for side in tuned.image_size])} pixels, "
        f"and cropped to the middle {size}"
    )
    where = PUBLISHED if published else "on validation images"
    found = "\n".join(f"| {name} | {value:.4g} |" for name, value in scores.items())
    table = f"\n## Scores {where}\n\n| | |\n|---|---|\n{found}\n" if found else ""
    head = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
    return f"""---
{head}---

# {tuned.backbone_name}, {len(tuned.classes)} classes

An image classifier made of `{tuned.backbone_name}`. {how}

Classes: {", ".join(tuned.classes)}.

```python
{_USE[format_name]}
```

An image is {resized} ({values["interpolation"]}); pixels in [0, 1] are normalised with mean ({mean}) and standard
deviation ({std}). `config.json` says the same.
{table}
The weights are stored in {precision}. On {images} images the logits differ from the tuned model's by at most
{difference:.1e}.
"""


def _base_model(tuned: Classifier) -> str | None:
    """The name on the hub of the model that was tuned."""
    scheme, _, place = tuned.backbone_name.partition(":")
    if scheme == "hf-hub":
        return place
    described = getattr(tuned.model, "pretrained_cfg", None) or {}
    named = described.get("hf_hub_id")
    if named and named.endswith("/"):
        named += ".".join(filter(None, (described.get("architecture"), described.get("tag"))))
    return named or None
