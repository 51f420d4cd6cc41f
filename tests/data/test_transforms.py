"""Sizes, normalisation and what each augmentation does to an image."""

import pytest
import torch
from PIL import Image

from snell_lightning.adapters.errors import UserError
from snell_lightning.backbones import data_config
from snell_lightning.data.transforms import Normalization, build_transforms

CONFIG = {
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "interpolation": "bilinear",
    "crop_pct": 0.5,
}


def half_red(width: int = 40, height: int = 20) -> Image.Image:
    """Left half black, right half red."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 0, 0), (width // 2, 0, width, height))
    return image


@pytest.mark.parametrize("augmentation", ["crop", "light", "none"])
@pytest.mark.parametrize("size", [16, 33])
def test_results_are_float_squares_of_the_asked_size(augmentation: str, size: int) -> None:
    for transform in build_transforms(CONFIG, augmentation, "auto", size):
        result = transform(half_red())
        assert type(result) is torch.Tensor
        assert (result.shape, result.dtype) == ((3, size, size), torch.float32)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("auto", CONFIG["mean"], CONFIG["std"]),
        # The values of the ImageNet training set that torchvision and timm use.
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("inception", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ],
)
def test_normalization_names_stand_for_these_values(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    assert Normalization.resolve(name, CONFIG) == Normalization(name, mean, std)
    _, transform = build_transforms(CONFIG, "none", name, 8)
    white = transform(Image.new("RGB", (9, 9), (255, 255, 255)))
    expected = (1 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(white, expected[:, None, None].expand(3, 8, 8))


def test_auto_normalization_is_the_backbones_own() -> None:
    # test_vit.r160_in1k was trained with 0.5 throughout.
    assert Normalization.resolve("auto", data_config("test_vit.r160_in1k")).mean == (0.5, 0.5, 0.5)


def test_no_augmentation_keeps_the_whole_image_in_training_and_evaluation() -> None:
    train, evaluation = build_transforms(CONFIG, "none", "none", 16)
    image = half_red()
    assert torch.equal(train(image), evaluation(image))
    red = evaluation(image)[0]
    assert red[:, :6].max() < 0.1
    assert red[:, 10:].min() > 0.9


def test_crop_evaluates_the_centre_at_the_backbones_crop_share() -> None:
    _, evaluation = build_transforms(CONFIG, "crop", "none", 16)
    # 64 x 64 with a red square of half the side in its centre; crop_pct 0.5 keeps just that square.
    image = Image.new("RGB", (64, 64))
    image.paste((255, 0, 0), (16, 16, 48, 48))
    assert evaluation(image)[0, 1:-1, 1:-1].min() > 0.95


def test_light_never_flips_and_crop_does() -> None:
    torch.manual_seed(0)

    def flipped(augmentation: str) -> int:
        train, _ = build_transforms(CONFIG, augmentation, "none", 16)
        views = [train(half_red(20, 20))[0] for _ in range(40)]
        return sum(bool(view[:, :3].mean() > view[:, -3:].mean()) for view in views)

    assert flipped("light") == 0
    assert flipped("crop") > 5


def test_augmentation_repeats_with_torchs_seed() -> None:
    train, _ = build_transforms(CONFIG, "crop", "none", 16)
    views = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(train(half_red()))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


def test_unknown_names_are_answered_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"data\.augmentation is 'heavy'; expected one of crop, light, none"):
        build_transforms(CONFIG, "heavy", "auto", 16)
    with pytest.raises(UserError, match=r"data\.normalization is 'zero'; expected one of auto, imagenet"):
        build_transforms(CONFIG, "crop", "zero", 16)
