"""Several adapters for one backbone: each computes what it computes alone, and the frozen weights are there once."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from snell_lightning.adapters import (
    AdapterSet,
    SnellConfig,
    UserError,
    freeze_all_but_head,
    heads,
    inject,
    load_adapter,
    save_adapter,
)

from .models import FAMILIES, enlarge, large_config, make_images, make_model

# Other layers, another rank, and the backbone's own token or nothing of it.
CONFIGS = {
    "first": large_config(),
    "second": large_config(rank=8, sparsity=0.9, exclude=["fc2", "conv_pwl"], train_also=[]),
    "head alone": None,
}
CLASSES = {"first": 5, "second": 3, "head alone": 7}


def tuned_model(family: str, name: str) -> nn.Module:
    """The family's model with an adapter's kind of tuning, every trained tensor drawn anew."""
    config: SnellConfig | None = CONFIGS[name]
    model = make_model(family)
    model.reset_classifier(CLASSES[name])
    if config is None:
        freeze_all_but_head(model)
    else:
        inject(model, config)
        enlarge(model)
    torch.manual_seed(len(name))
    for head in heads(model).values():
        nn.init.normal_(head.weight)
    if getattr(model, "cls_token", None) is not None and model.cls_token.requires_grad:
        nn.init.normal_(model.cls_token)
    return model.eval()


def save(folder: Path, family: str, name: str) -> Path:
    """The adapter file of such a model."""
    path = folder / f"{name}.safetensors"
    save_adapter(path, tuned_model(family, name), CONFIGS[name], FAMILIES[family].name, classes=list(range(9)))
    return path


def logits(model: nn.Module, family: str) -> Tensor:
    """Logits of the two fixed images."""
    with torch.no_grad():
        return model(make_images(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_each_adapter_gives_what_it_gives_alone_whatever_was_on_before(family: str, tmp_path: Path) -> None:
    expected = {}
    switched = AdapterSet(make_model(family), FAMILIES[family].name)
    for name in CONFIGS:
        path = save(tmp_path, family, name)
        alone = make_model(family)
        alone.reset_classifier(CLASSES[name])
        load_adapter(path, alone)
        expected[name] = logits(alone.eval(), family)
        switched.load(path, name)
        assert torch.equal(logits(switched.model, family), expected[name])

    for name in ("first", "head alone", "second", "first", "first", "second", "head alone"):
        switched.put_on(name)
        assert torch.equal(logits(switched.model, family), expected[name]), name
        assert switched.model.num_classes == CLASSES[name]

    assert switched.names == tuple(CONFIGS)


def test_frozen_weights_are_in_memory_once(tmp_path: Path) -> None:
    plain = make_model("vit")
    places = {name: tensor.data_ptr() for name, tensor in plain.state_dict().items() if not name.startswith("head")}
    switched = AdapterSet(plain)
    for name in CONFIGS:
        switched.load(save(tmp_path, "vit", name), name)

    for name in CONFIGS:
        switched.put_on(name)
        now = switched.model.state_dict()
        assert {key: now[key].data_ptr() for key in places} == places


def test_without_an_adapter_it_is_the_plain_backbone_to_the_last_bit(tmp_path: Path) -> None:
    switched = AdapterSet(make_model("deit-distilled"))
    switched.load(save(tmp_path, "deit-distilled", "first"), "first")

    switched.put_on(None)

    plain = make_model("deit-distilled")
    assert switched.active is None
    assert [type(module) for module in switched.model.modules()] == [type(module) for module in plain.modules()]
    images = make_images("deit-distilled")
    with torch.no_grad():
        assert torch.equal(switched.model.forward_features(images), plain.forward_features(images))


def test_a_deleted_adapter_is_gone_and_its_name_is_free(tmp_path: Path) -> None:
    switched = AdapterSet(make_model("vit"))
    path = save(tmp_path, "vit", "first")
    switched.load(path, "first")

    switched.delete("first")

    assert (switched.names, switched.active) == ((), None)
    with pytest.raises(UserError, match="no adapter 'first'; loaded are none"):
        switched.put_on("first")
    switched.load(path, "first")
    assert switched.active == "first"


def test_a_file_that_does_not_fit_leaves_everything_as_it_was(tmp_path: Path) -> None:
    switched = AdapterSet(make_model("vit"))
    switched.load(save(tmp_path, "vit", "first"), "first")
    before = logits(switched.model, "vit")
    other = make_model("vit", seed=1)
    inject(other, large_config())
    save_adapter(tmp_path / "other.safetensors", other, large_config(), "test_vit")

    with pytest.raises(UserError, match="other frozen weights"):
        switched.load(tmp_path / "other.safetensors", "other")

    assert (switched.names, switched.active) == (("first",), "first")
    assert torch.equal(logits(switched.model, "vit"), before)
    with pytest.raises(UserError, match="'first' already"):
        switched.load(tmp_path / "first.safetensors", "first")
