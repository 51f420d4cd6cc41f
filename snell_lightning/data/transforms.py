"""From an RGB image to a normalised tensor, for training and for evaluation.

Sizes, normalisation and evaluation crop come from the backbone's own configuration unless overridden. All
randomness is drawn from torch's generator, so the seed of the run settles it.

torchvision is imported where transforms are built: the command line needs the choices' names alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from PIL import Image

from snell_lightning.adapters.errors import UserError
from snell_lightning.backbones.sizes import ImageSize, sides

if TYPE_CHECKING:
    from torchvision.transforms import RandomResizedCrop

Augmentation = Literal["crop", "light", "none"]
NormalizationName = Literal["auto", "imagenet", "inception", "none"]
NormalizationSetting = NormalizationName | dict[str, list[float]]
Transform = Callable[[Image.Image], torch.Tensor]

# As in timm.data.constants: that of ImageNet's training images, and that of the Inception models.
_FIXED = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


@dataclass(frozen=True)
class Normalization:
    """Per-channel normalisation `(pixel - mean) / std` of pixels in [0, 1].

    Args:
        name: What was asked for: `auto`, `imagenet`, `inception` or `none`, or `given` where it was spelled out.
        mean: Mean of the red, green and blue channel.
        std: Standard deviation of the red, green and blue channel.
    """

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def resolve(cls, setting: str | Mapping[str, Any], config: Mapping[str, Any]) -> "Normalization":
        """The mean and standard deviation that a setting stands for.

        Args:
            setting: `auto` for the backbone's own, `imagenet`, `inception` (0.5 and 0.5) or `none` (0 and 1), or
                `mean` and `std` of three numbers each.
            config: The backbone's `mean` and `std`.

        Raises:
            UserError: The setting is none of these.
        """
        if isinstance(setting, Mapping):
            values = {key: tuple(float(value) for value in setting.get(key, ())) for key in ("mean", "std")}
            if (
                set(setting) != set(values)
                or any(len(value) != 3 for value in values.values())
                or min(values["std"]) <= 0
            ):
                raise UserError(
                    f"data.normalization is {dict(setting)}; expected mean and std of three numbers each, std above 0"
                )
            return cls("given", values["mean"], values["std"])
        require_choice("normalization", setting, get_args(NormalizationName))
        mean, std = _FIXED[setting] if setting in _FIXED else (config["mean"], config["std"])
        return cls(setting, tuple(float(value) for value in mean), tuple(float(value) for value in std))


def build_transforms(
    config: Mapping[str, Any], augmentation: str, normalization: str | Mapping[str, Any], image_size: ImageSize
) -> tuple[Transform, Transform]:
    """Build the transforms for training and for evaluation.

    Args:
        config: The backbone's `mean`, `std`, `interpolation` and `crop_pct`.
        augmentation: `crop`: train on random crops of 0.08 to 1 of the area and horizontal flips, evaluate
            on the centre crop that the backbone was evaluated on. `light`: train on random crops of 0.8 to 1
            without flips, evaluate on the whole image. `none`: the whole image resized to that size, in
            training and in evaluation (the VTAB protocol). Resizing is bicubic, except for the centre crop,
            which uses the backbone's own interpolation.
        normalization: See `Normalization.resolve`.
        image_size: Of the result, in pixels.

    Returns:
        Training and evaluation transform, each from an RGB image to float32 (3, height, width).

    Raises:
        UserError: `augmentation` or `normalization` is none of the choices.
    """
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    require_choice("augmentation", augmentation, get_args(Augmentation))
    to_tensor = ToNormalized(Normalization.resolve(normalization, config))
    size = sides(image_size)
    whole = transforms.Resize(size, InterpolationMode.BICUBIC)
    train: list[Any]
    evaluation: list[Any]
    if augmentation == "crop":
        interpolation = InterpolationMode(config["interpolation"])
        train = [_random_crop(size, smallest=0.08), transforms.RandomHorizontalFlip()]
        evaluation = [_cover(size, config["crop_pct"], interpolation), transforms.CenterCrop(size)]
    elif augmentation == "light":
        train, evaluation = [_random_crop(size, smallest=0.8)], [whole]
    else:
        train, evaluation = [whole], [whole]
    return transforms.Compose([*train, to_tensor]), transforms.Compose([*evaluation, to_tensor])


class ToNormalized:
    """An 8-bit RGB image as a normalised float32 tensor (3, height, width), in one pass and one multiply-add.

    Args:
        normalization: Mean and standard deviation of pixels in [0, 1].
    """

    def __init__(self, normalization: Normalization) -> None:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (normalization.mean, normalization.std))
        self.factor, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Convert an image."""
        pixels = torch.from_numpy(np.array(image))
        values = pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        return values.mul_(self.factor).add_(self.shift)


def require_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    """Check a value that must be one of a few.

    Raises:
        UserError: It is none of them.
    """
    if value not in choices:
        raise UserError(f"data.{argument} is {value!r}; expected one of {', '.join(choices)}")


def _random_crop(size: tuple[int, int], smallest: float) -> "RandomResizedCrop":
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    return RandomResizedCrop(size, scale=(smallest, 1.0), interpolation=InterpolationMode.BICUBIC)


def _cover(size: tuple[int, int], crop_pct: float, interpolation: Any) -> Any:
    """Resize, in its own proportions, so that the middle of the image fills the size."""
    from torchvision.transforms import Resize

    height, width = (int(side / crop_pct) for side in size)
    if height == width:
        return Resize(height, interpolation)
    from timm.data.transforms import ResizeKeepRatio

    return ResizeKeepRatio((height, width), interpolation=interpolation.value)
