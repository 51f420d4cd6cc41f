"""Three lines of Python: the same predictions as the run's own evaluation, from whatever people call an image."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from snell_lightning import ImageDataModule, SnellConfig, UserError, load_classifier, save_adapter
from snell_lightning.adapters import inject
from snell_lightning.backbones import EMBEDDED_BACKBONE, create_backbone

from .conftest import save, tuned


def paths(photos: Path) -> list[Path]:
    """All images."""
    return sorted(photos.rglob("*.png"))


@pytest.mark.parametrize("augmentation", ["crop", "light", "none"])
def test_predictions_are_those_of_the_runs_own_evaluation(photos: Path, tmp_path: Path, augmentation: str) -> None:
    module = tuned(photos)
    file = save(tmp_path / "adapter.safetensors", module, photos, augmentation)
    data = ImageDataModule("folder", str(photos), augmentation=augmentation, eval_split="all", batch_size=64)
    (batch,) = data.predict_dataloader()
    with torch.no_grad():
        logits = module(batch[0])
    expected = dict(zip((path for path, _ in data.eval_samples), logits.softmax(-1), strict=True))

    classifier = load_classifier(file, "cpu")
    found = classifier.predict([str(path) for path in paths(photos)], top_k=10)

    assert classifier.classes == data.class_names
    for path, prediction in zip(paths(photos), found, strict=True):
        likely, places = expected[str(path)].sort(descending=True)
        assert prediction.labels == tuple(data.class_names[place] for place in places)
        torch.testing.assert_close(torch.tensor(prediction.probabilities), likely, rtol=1e-4, atol=1e-6)


def test_an_image_is_a_path_a_picture_an_array_or_a_tensor(adapter: Path, photos: Path) -> None:
    classifier = load_classifier(adapter, "cpu")
    path = paths(photos)[5]
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [path, str(path), picture, array, array[..., 0], array / 255, tensor, tensor[:1], tensor / 255]

    one = classifier.predict(path)
    many = classifier.predict(forms, batch_size=4)

    assert one.label == one.labels[0]
    assert one.probability == max(one.probabilities)
    for form, prediction in zip(forms, many, strict=True):
        assert prediction.labels == one.labels, form
        assert prediction.probabilities == pytest.approx(one.probabilities, rel=1e-4)
    batch = classifier.predict(np.stack([array, array]), top_k=2)
    assert [len(prediction.labels) for prediction in batch] == [2, 2]
    assert classifier.predict([]) == []


def test_transparency_is_put_on_white_as_in_training(adapter: Path) -> None:
    classifier = load_classifier(adapter, "cpu")
    pixels = np.zeros((20, 20, 4), np.uint8)

    assert classifier.predict(pixels) == classifier.predict(np.full((20, 20, 3), 255, np.uint8))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("missing.png", r"cannot read image missing.png: .*No such file or directory"),
        (np.zeros((4, 4, 3), np.int32), "an image of int32; expected 8 bits"),
        (np.full((4, 4, 3), 2.0), "floats from 2 to 2; expected 0 to 1"),
        (np.full((4, 4), np.nan), "floats from nan to nan"),
        (np.zeros((3, 8, 9), np.uint8), r"shape \(3, 8, 9\) is not an image; expected \(H, W\)"),
        (torch.zeros(4, 4), r"shape \(4, 4\) is not an image; expected \(channels, H, W\)"),
        (torch.zeros(9, 8, 3), r"shape \(8, 3, 9\) is not an image"),
        ([3], "int is not an image"),
    ],
)
def test_what_is_no_image_is_named(adapter: Path, given: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_classifier(adapter, "cpu").predict(given)


def test_merged_it_is_a_plain_timm_model_with_the_same_logits(adapter: Path, photos: Path) -> None:
    classifier = load_classifier(adapter, "cpu")
    before = classifier.predict(paths(photos))
    features = classifier.embed(paths(photos)[:3])

    classifier.merge()

    plain = timm.create_model(classifier.backbone_name, num_classes=10)
    assert classifier.model.state_dict().keys() == plain.state_dict().keys()
    for ours, expected in zip(classifier.predict(paths(photos)), before, strict=True):
        assert ours.labels == expected.labels
        assert ours.probabilities == pytest.approx(expected.probabilities, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(classifier.embed(paths(photos)[:3]), features, rtol=1e-4, atol=1e-5)
    assert features.shape == (3, classifier.model.num_features)
    with pytest.raises(UserError, match="merged into the weights"):
        classifier.set_adapter("default")


def test_adapters_of_other_classes_and_sizes_of_update_are_switched(photos: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    for label in ("digit 3", "digit 7"):
        (two / label).mkdir(parents=True)
        for file in (photos / label).iterdir():
            (two / label / file.name).write_bytes(file.read_bytes())
    first = save(tmp_path / "first.safetensors", tuned(photos, 0), photos)
    second = save(tmp_path / "second.safetensors", tuned(two, 1, SnellConfig(rank=2, sparsity=0.9)), two)
    alone = {name: load_classifier(file, "cpu").predict(paths(photos)) for name, file in (("a", first), ("b", second))}

    classifier = load_classifier(first, "cpu", name="a")
    classifier.load_adapter(second, "b")

    assert (classifier.adapters, classifier.active_adapter) == (("a", "b"), "b")
    for name in ("b", "a", "b"):
        classifier.set_adapter(name)
        assert classifier.predict(paths(photos)) == alone[name]
    assert classifier.classes == ("digit 3", "digit 7")
    classifier.delete_adapter("b")
    with pytest.raises(UserError, match="no adapter is on"):
        classifier.predict(paths(photos)[0])


def test_a_file_that_does_not_say_its_classes_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=3)
    config = SnellConfig(rank=2)
    inject(model, config)
    save_adapter(tmp_path / "bare.safetensors", model, config, "test_vit")

    with pytest.raises(UserError, match="does not say its classes, image_size"):
        load_classifier(tmp_path / "bare.safetensors")


def test_weights_from_a_file_are_found_again_or_asked_for(photos: Path, tmp_path: Path) -> None:
    release = tmp_path / "release.pth"
    state = create_backbone(EMBEDDED_BACKBONE, num_classes=3, pretrained=False).state_dict()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, release)
    module = tuned(photos, weights=str(release))
    file = save(tmp_path / "adapter.safetensors", module, photos)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = module(images).softmax(-1)

    assert torch.allclose(load_classifier(file, "cpu").probabilities(images), expected, atol=1e-6)

    moved = release.rename(tmp_path / "moved.pth")
    with pytest.raises(UserError, match=r"was tuned from the weights in .*release.pth, which is not there; say where"):
        load_classifier(file)
    again = load_classifier(file, "cpu", weights=moved)
    assert torch.allclose(again.probabilities(images), expected, atol=1e-6)
    # Other weights are not those that the adapter was tuned with.
    torch.save(create_backbone(EMBEDDED_BACKBONE, num_classes=3, pretrained=False).state_dict(), moved)
    with pytest.raises(UserError, match="other frozen weights"):
        load_classifier(file, weights=moved)


def test_weights_without_being_asked_to_be_pretrained_contradict_themselves() -> None:
    with pytest.raises(UserError, match=r"pretrained is false, and weights names w.pth; leave one of them out"):
        create_backbone(EMBEDDED_BACKBONE, 3, pretrained=False, weights="w.pth")
