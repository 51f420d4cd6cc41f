"""`merge --adapter FILE --output DIR`: the tuned model as a plain one, for software that knows nothing of this package.

    timm            config.json with classes and transform, model.safetensors: timm.create_model("local-dir:DIR", True)
    onnx            model.onnx, for a batch of any size
    torch_export    model.pt2, likewise

each with `config.json` and a model card, README.md. What was written is read again by the software that it is for, and
has to give the tuned model's logits on real images before it counts as done; what fails leaves nothing behind.
"""

import copy
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from snell_lightning.adapters import UserError
from snell_lightning.adapters.injection import take_off
from snell_lightning.arguments import tell
from snell_lightning.backbones.embedded import EMBEDDED_ARGUMENTS, EMBEDDED_BACKBONE, EMBEDDED_PLAIN
from snell_lightning.inference.card import model_card
from snell_lightning.inference.classifier import Classifier, load_classifier
from snell_lightning.inference.listing import list_images
from snell_lightning.inference.pictures import as_picture

TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the largest logit where that is above 1."""
_LOST = 0.1  # of what tuning changed in the logits, what a lower precision may change
_IMAGES = 16
_ONE_FILE = 2**30  # bytes of weights; ONNX files end at 2 GiB, and have them in a second file then

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Merge:
    """What is to be written.

    Attributes:
        adapter: The adapter file.
        output: The folder to make.
        format: `timm`, `onnx` or `torch_export`.
        precision: `float32`, `bfloat16` or `float16`: the type that weights are stored in.
        images: Files or folders of images on which the result is compared with the tuned model; by default pieces of
            two photographs that scikit-learn carries.
        weights: Where the backbone's weights are, if not where the adapter file says.
    """

    adapter: str
    output: str
    format: str = "timm"
    precision: str = "float32"
    images: Sequence[str] | None = None
    weights: str | None = None


def merge_adapter(job: Merge) -> None:
    """Write it, and compare it with the tuned model.

    Raises:
        UserError: The folder is there already, a package is missing, or the result is not the tuned model.
    """
    target = Path(job.output)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--output {target} exists; name a folder that does not")
    if job.precision != "float32" and job.format != "timm":
        raise UserError(f"--precision {job.precision} goes with --format timm; {job.format} is written in float32")
    tuned = load_classifier(job.adapter, "cpu", weights=job.weights)
    pictures = _pictures(job.images)
    images = torch.stack([tuned.transform(picture) for picture in pictures])
    expected = _logits(tuned.model, images)
    # Of a linear probe all of the logits are what tuning has made.
    probe = tuned.metadata["config"] is None
    untuned = torch.zeros_like(expected) if probe else _logits(_without_update(tuned), images)
    tuned.merge()
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        write, read = _FORMATS[job.format]
        write(tuned, unfinished, job)
        _write_config(tuned, unfinished)
        found = read(unfinished)
        _require_any_batch(found, images)
        logits = _logits(found, images)
        difference = _require_same(job, logits, expected, untuned)
        if job.format == "timm":
            _require_transform(unfinished, pictures, images)
        card = model_card(tuned, job.format, job.precision, difference, len(images))
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        if target.exists():
            target.rmdir()
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    tell(
        f"merged: {target} ({job.format}, {job.precision}); on {len(images)} images its logits differ from the tuned "
        f"model's by at most {difference:.1e}"
    )


def _pictures(given: Sequence[str] | None) -> list[Image.Image]:
    """Real images to compare on."""
    if given is not None:
        return [as_picture(path) for path in list_images(given)[0][:_IMAGES]]
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    # Pieces of half, third, ... the size: different things at different scales.
    places = np.random.default_rng(0)
    pieces = []
    for number in range(_IMAGES):
        photo = photos[number % len(photos)]
        side = min(photo.size) // (1 + number // 4)
        left, top = (int(places.integers(0, size - side + 1)) for size in photo.size)
        pieces.append(photo.crop((left, top, left + side, top + side)))
    return pieces


def _without_update(tuned: Classifier) -> nn.Module:
    """The tuned head on the frozen backbone: what would be left if the update were lost."""
    model = copy.deepcopy(tuned.model)
    take_off(model)
    return model


@torch.no_grad()
def _logits(model: Model, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(8)]).float()


def _require_any_batch(model: Model, images: Tensor) -> None:
    """Raise unless the model takes batches of other sizes, and gives the same for an image whatever is beside it."""
    one, many = _logits(model, images[:1]), _logits(model, images[:5])
    if not torch.allclose(one[0], many[0], rtol=0, atol=TOLERANCE * max(1.0, float(many.abs().max()))):
        raise UserError("the merged model gives other logits for an image in another batch; that is a fault of ours")


def _require_same(job: Merge, found: Tensor, expected: Tensor, untuned: Tensor) -> float:
    """The largest difference of the logits.

    Raises:
        UserError: It is too large.
    """
    difference = float((found - expected).abs().max())
    change = float((expected - untuned).abs().max())
    if job.precision == "float32":
        allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
        if not difference <= allowed:
            raise UserError(
                f"the merged model's logits differ by {difference:.2e} from the tuned model's; expected at "
                f"most {allowed:.2e}, and nothing is written"
            )
        return difference
    share = difference / change if change else math.inf
    if not share <= _LOST or not torch.equal(found.argmax(1), expected.argmax(1)):
        differ = int((found.argmax(1) != expected.argmax(1)).sum())
        raise UserError(
            f"{job.precision} loses the update: it changes the logits by {difference:.2e}, {share:.0%} of the "
            f"{change:.2e} that tuning changed (expected at most {_LOST:.0%}), and the class of {differ} of "
            f"{len(found)} images; keep float32"
        )
    return difference


def _write_config(tuned: Classifier, folder: Path) -> None:
    """The classes, the architecture, and what becomes of an image, as timm and model hubs have them."""
    values, model = tuned.metadata, tuned.model
    mean_std = values["normalization"]
    whole = values["augmentation"] != "crop"
    data = {
        "input_size": (3, *tuned.image_size),
        "interpolation": values["interpolation"],
        "mean": tuple(mean_std["mean"]),
        "std": tuple(mean_std["std"]),
        # The whole image, resized to the size, is what timm calls squashed.
        "crop_pct": 1.0 if whole else values["crop_pct"],
        "crop_mode": "squash" if whole else "center",
    }
    named: dict[str, Any] = {"label_names": list(tuned.classes)}
    arguments: dict[str, Any] = dict(values.get("backbone_args") or {})
    if tuned.backbone_name == EMBEDDED_BACKBONE:
        named["pretrained_cfg"] = {"architecture": EMBEDDED_PLAIN}
        arguments = {**EMBEDDED_ARGUMENTS, "img_size": tuned.image_size, **arguments}
    save_config_for_hf(model, str(folder / "config.json"), named, _built_with(arguments), data)


def _built_with(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments without those that matter in training alone."""
    return {key: value for key, value in arguments.items() if not key.endswith(("drop_rate", "drop_path_rate"))}


def _write_timm(tuned: Classifier, folder: Path, job: Merge) -> None:
    kind = getattr(torch, job.precision)
    tensors = {
        name: (tensor.to(kind) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tuned.model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _read_timm(folder: Path) -> Model:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    absent = model.state_dict().keys() ^ load_file(folder / "model.safetensors").keys()
    if absent:
        raise UserError(f"timm reads the merged model without {', '.join(sorted(absent)[:3])}")
    return model


def _require_transform(folder: Path, pictures: Sequence[Image.Image], images: Tensor) -> None:
    """Raise unless timm makes of an image what the tuned model's own transform does."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    transform: Any = create_transform(**resolve_data_config({}, model=model))
    for picture, image in zip(pictures, images, strict=True):
        found = transform(picture)
        if found.shape != image.shape or not torch.allclose(found, image, rtol=0, atol=1e-5):
            raise UserError("timm's transform gives another image than the tuned model's; that is a fault of ours")


def _write_onnx(tuned: Classifier, folder: Path, job: Merge) -> None:
    absent = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if absent:
        raise UserError(f"--format onnx needs {absent[0]}: pip install 'snell_lightning[onnx]'")
    torch.onnx.export(
        tuned.model.eval(),
        (_example(tuned),),
        str(folder / "model.onnx"),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=_any_batch(),
        dynamo=True,
        external_data=sum(tensor.nbytes for tensor in tuned.model.state_dict().values()) > _ONE_FILE,
        verbose=False,
    )


def _read_onnx(folder: Path) -> Model:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_torch_export(tuned: Classifier, folder: Path, job: Merge) -> None:
    program = torch.export.export(tuned.model.eval(), (_example(tuned),), dynamic_shapes=_any_batch())
    torch.export.save(program, folder / "model.pt2")


def _read_torch_export(folder: Path) -> Model:
    return torch.export.load(folder / "model.pt2").module()


def _example(tuned: Classifier) -> Tensor:
    return torch.zeros(2, 3, *tuned.image_size)


def _any_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


_FORMATS: dict[str, tuple[Callable[[Classifier, Path, Merge], None], Callable[[Path], Model]]] = {
    "timm": (_write_timm, _read_timm),
    "onnx": (_write_onnx, _read_onnx),
    "torch_export": (_write_torch_export, _read_torch_export),
}
