"""A tuned model to be used: from an adapter file to predictions in three lines.

    from snell_lightning import load_classifier
    classifier = load_classifier("runs/version_0/adapter.safetensors")
    print(classifier.predict("photo.jpg").label)

An adapter file says what it takes: the backbone, the classes, and what becomes of an image. Further adapters for the
same backbone can be loaded beside it and switched; the frozen weights are in memory once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from snell_lightning.adapters import AdapterSet, UserError, merge, read_adapter
from snell_lightning.backbones import create_backbone
from snell_lightning.backbones.sizes import sides
from snell_lightning.data.transforms import Transform, build_transforms
from snell_lightning.inference.pictures import Picture, as_picture, default_device, several

_NEEDED = ("classes", "image_size", "normalization", "augmentation", "crop_pct", "interpolation")


@dataclass(frozen=True)
class Prediction:
    """What an image shows, the most probable class first.

    Attributes:
        labels: Names of the classes.
        probabilities: Theirs, in [0, 1].
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.labels[0]

    @property
    def probability(self) -> float:
        """That class's probability, in [0, 1]."""
        return self.probabilities[0]


class Classifier:
    """A backbone with the adapters that were loaded, of which one is on. Made by `load_classifier`.

    Args:
        backbone: A plain backbone.
        name: The name it was created by.
        created: What else it was created with, by which adapters that belong to another model are refused.
        device: Where it computes.
    """

    def __init__(self, backbone: nn.Module, name: str, created: dict[str, Any], device: torch.device) -> None:
        self.device, self.backbone_name = device, name
        self._created = created
        self._adapters: AdapterSet | None = AdapterSet(backbone.to(device), name)
        self._metadata: dict[str, Any] = {}
        self._model: nn.Module = backbone

    @property
    def model(self) -> nn.Module:
        """The tuned backbone: normalised images `(batch, 3, height, width)` to logits `(batch, classes)`."""
        return self._model

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits."""
        return tuple(self.metadata["classes"])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model sees, in pixels."""
        return sides(self.metadata["image_size"])

    @property
    def transform(self) -> Transform:
        """From an RGB image to a normalised tensor `(3, height, width)`, as in the run's own evaluation."""
        values = self.metadata
        config = {"crop_pct": values["crop_pct"], "interpolation": values["interpolation"]}
        return build_transforms(config, values["augmentation"], values["normalization"], self.image_size)[1]

    @property
    def metadata(self) -> dict[str, Any]:
        """Of the file of the adapter that is on: `docs/adapter-files.md` names the keys."""
        self._require_adapter()
        if self._adapters is None:
            return self._metadata
        assert self._adapters.active is not None
        return self._adapters.metadata(self._adapters.active)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that are loaded."""
        return self._several.names

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter that is on."""
        return self._several.active

    def load_adapter(self, path: str | Path, name: str) -> None:
        """Load a further adapter of the same backbone, and put it on.

        Raises:
            UserError: The file is of another backbone or lacks what is needed to use it, or the name is taken.
        """
        self._check(path)
        self._several.load(path, name)

    def set_adapter(self, name: str) -> None:
        """Put a loaded adapter on, in the place of the one that is."""
        self._several.put_on(name)

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter; if it is on, another one has to be put on before the next prediction."""
        self._several.delete(name)

    def merge(self) -> "Classifier":
        """Add the update to the weights for good: `model` is a plain timm model then, and no adapter can be switched.

        Returns:
            The classifier, for chaining.
        """
        self._metadata = self.metadata
        self._adapters = None
        merge(self._model)
        return self

    @overload  # A str is a sequence of str, and is one path all the same.
    def predict(  # type: ignore[overload-overlap]
        self, images: Picture, top_k: int = ..., batch_size: int = ...
    ) -> Prediction: ...
    @overload
    def predict(self, images: Sequence[Picture], top_k: int = ..., batch_size: int = ...) -> list[Prediction]: ...
    def predict(
        self, images: Picture | Sequence[Picture], top_k: int = 5, batch_size: int = 32
    ) -> Prediction | list[Prediction]:
        """Classify images.

        Args:
            images: A path, a PIL image, an array or a tensor as `Picture` has them, or a sequence of these.
            top_k: Classes to name, at least 1; all of them where there are fewer.
            batch_size: Images at once.

        Returns:
            A prediction; a list of them for a sequence.

        Raises:
            UserError: An image cannot be read or is none.
        """
        if top_k < 1:
            raise UserError(f"top_k is {top_k}; expected at least 1")
        found: list[Prediction] = []
        for batch in self._batches(images, batch_size):
            found += self.top(self.probabilities(batch), top_k)
        return found if several(images) is not None else found[0]

    def embed(self, images: Picture | Sequence[Picture], batch_size: int = 32) -> Tensor:
        """Pooled features, as the head takes them: `(features,)`; `(images, features)` for a sequence. In fp32."""
        batches = [self.features(batch) for batch in self._batches(images, batch_size)]
        whole = torch.cat(batches) if batches else torch.zeros(0, getattr(self._model, "num_features", 0))
        return whole if several(images) is not None else whole[0]

    def probabilities(self, images: Tensor) -> Tensor:
        """Of normalised images `(batch, 3, height, width)`: `(batch, classes)`, in fp32, on the host."""
        self._require_adapter()
        with torch.inference_mode():
            return self._model(images.to(self.device)).float().softmax(-1).cpu()

    def features(self, images: Tensor) -> Tensor:
        """Likewise the pooled features, `(batch, features)`."""
        self._require_adapter()
        model: Any = self._model
        with torch.inference_mode():
            found = model.forward_head(model.forward_features(images.to(self.device)), pre_logits=True)
            return found.float().flatten(1).cpu()

    def top(self, probabilities: Tensor, top_k: int) -> list[Prediction]:
        """The most probable classes of each row of `(batch, classes)`."""
        classes = self.classes
        values, places = probabilities.topk(min(top_k, len(classes)))
        return [
            Prediction(tuple(classes[place] for place in row), tuple(likely))
            for row, likely in zip(places.tolist(), values.tolist(), strict=True)
        ]

    def _batches(self, images: Picture | Sequence[Picture], size: int) -> Iterator[Tensor]:
        given = several(images)
        pictures: list[Any] = [images] if given is None else given
        transform = self.transform
        for start in range(0, len(pictures), size):
            yield torch.stack([transform(as_picture(picture)) for picture in pictures[start : start + size]])

    @property
    def _several(self) -> AdapterSet:
        if self._adapters is None:
            raise UserError("the adapter was merged into the weights; load the classifier anew to switch adapters")
        return self._adapters

    def _require_adapter(self) -> None:
        if self._adapters is not None and self._adapters.active is None:
            raise UserError("no adapter is on; call set_adapter(name)")

    def _check(self, path: str | Path) -> None:
        metadata = read_adapter(path)[1]
        check_usable(path, metadata)
        made = {key: metadata.get(key, default) for key, default in (("backbone_args", {}), ("pretrained", True))}
        if metadata["backbone"] == self.backbone_name and made != self._created:
            raise UserError(f"{path} was made with {made}, and the backbone that is loaded with {self._created}")


def check_usable(path: str | Path, metadata: dict[str, Any]) -> None:
    """Raise unless an adapter file's metadata say what becomes of an image, and what the outputs mean.

    Raises:
        UserError: A key is missing.
    """
    if absent := [key for key in _NEEDED if key not in metadata]:
        raise UserError(
            f"{path} does not say its {', '.join(absent)}, which is needed to use it; write adapters with "
            "`python -m snell_lightning fit`, or give save_adapter these values"
        )


def load_classifier(
    path: str | Path,
    device: str | torch.device | None = None,
    name: str = "default",
    weights: str | Path | None = None,
) -> Classifier:
    """A tuned model from its adapter file alone.

    Args:
        path: The file, as `fit` leaves it in a run's folder.
        device: Where to compute; by default the accelerator, where there is one.
        name: To call the adapter by, where others are loaded beside it.
        weights: Where the backbone's weights are now, if it was tuned from a file that is elsewhere since.

    Raises:
        UserError: There is no such file, it does not say enough, or its backbone cannot be had.
    """
    metadata = read_adapter(path)[1]
    check_usable(path, metadata)
    arguments = metadata.get("backbone_args") or {}
    pretrained = metadata.get("pretrained", True)
    size: Any = metadata["image_size"]
    weights = weights or metadata.get("weights")
    if weights is not None and not Path(weights).exists():
        raise UserError(
            f"{path} was tuned from the weights in {weights}, which is not there; say where it is with --weights, or "
            "load_classifier(..., weights=PATH)"
        )
    backbone = create_backbone(metadata["backbone"], len(metadata["classes"]), pretrained, size, weights, **arguments)
    created = {"backbone_args": arguments, "pretrained": pretrained}
    classifier = Classifier(
        backbone, metadata["backbone"], created, default_device() if device is None else torch.device(device)
    )
    classifier.load_adapter(path, name)
    return classifier
