"""The LightningModule without the command line: schedule, parameter groups, mixing, metrics, frozen statistics."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from snell_lightning import ImageClassifier, SnellConfig, UserError
from snell_lightning.adapters import adapter_parameters, adapter_state_dict
from snell_lightning.adapters.update.rule import UpdateRule
from snell_lightning.callbacks import AdapterCheckpoint
from snell_lightning.schedule import long_enough, warmup_cosine

SMALL = SnellConfig(rank=2, targets=[r"attn\.qkv"])


def tiny(**arguments: Any) -> ImageClassifier:
    """A small ViT with random weights, for images of 32 pixels."""
    options: dict[str, Any] = {
        "backbone": "test_vit",
        "pretrained": False,
        "backbone_args": {"img_size": 32},
        "num_classes": 7,
        "adapter": SMALL,
    }
    return ImageClassifier(**{**options, **arguments})


def batch(count: int, classes: int = 7) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 32, 32), torch.arange(count) % classes


def trainer(folder: Path, **arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "max_steps": 1, "num_sanity_val_steps": 0, **arguments},
    )


def configured(module: ImageClassifier, steps: float = 10) -> Any:
    """What `configure_optimizers` makes for a run of so many steps."""
    module._trainer = SimpleNamespace(estimated_stepping_batches=steps)  # type: ignore[assignment]
    return module.configure_optimizers()


def rate_of(module: ImageClassifier, optimizer: torch.optim.Optimizer, key: str = "lr") -> dict[str, float]:
    """A setting of the optimizer for each trained parameter by name."""
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    return {names[id(p)]: group[key] for group in optimizer.param_groups for p in group["params"]}


def fake_step(module: ImageClassifier) -> None:
    """Stand in for a trainer, so that a step can be called on its own."""
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        optimizers=[SimpleNamespace(param_groups=[{"lr": 1e-3}])], global_step=0
    )
    module.log = lambda *_, **__: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("step", "expected"),
    # Two steps of warm-up from 0.1, then half a cosine over eight steps down to 0.2.
    [(0, 0.1), (1, 0.55), (2, 1.0), (4, 0.2 + 0.8 * (2 + math.sqrt(2)) / 4), (6, 0.6), (10, 0.2), (11, 0.2)],
)
def test_the_factor_rises_linearly_then_falls_as_a_cosine(step: int, expected: float) -> None:
    assert warmup_cosine(10, 0.2, start=0.1, end=0.2)(step) == pytest.approx(expected)


def test_without_warm_up_the_factor_starts_at_one() -> None:
    assert [warmup_cosine(2, 0.0, 0.1, 0.0)(step) for step in range(3)] == pytest.approx([1.0, 0.5, 0.0])


def test_no_start_or_end_above_the_rate_itself_and_no_division_by_zero_in_the_shortest_runs() -> None:
    assert [warmup_cosine(4, 0.5, 3.0, 2.0)(step) for step in range(5)] == pytest.approx([1.0] * 5)
    assert warmup_cosine(1, 0.99, 0.5, 0.0)(0) == 0.5
    assert warmup_cosine(0, 0.1, 0.5, 0.0)(0) == 1.0


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"), [(0.1, 1000, 0.1), (0.1, 100, 0.2), (0.3, 50, 0.4), (0.1, 10, 0.5), (0.0, 10, 0.0)]
)
def test_a_warm_up_is_no_shorter_than_twenty_steps_or_half_the_run(warmup: float, steps: int, expected: float) -> None:
    assert long_enough(warmup, steps) == pytest.approx(expected)
    assert long_enough(0.1, 0) == 0.1


def test_the_rate_changes_every_step_between_the_bounds_that_are_set(tmp_path: Path) -> None:
    module = tiny(warmup=0.5, warmup_lr=1e-4, min_lr=2e-4, optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-3))
    rates: list[float] = []
    module.on_train_batch_start = lambda *_: rates.append(module.optimizers().param_groups[0]["lr"])  # type: ignore
    trainer(tmp_path, max_steps=4).fit(module, DataLoader([(x, y) for x, y in zip(*batch(8), strict=True)], 2))
    # Half of four steps rise from 1e-4 to 1e-3; of the cosine's two steps the first is at 1e-3 and the second halfway.
    assert rates == pytest.approx([1e-4, 5.5e-4, 1e-3, 6e-4])
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(2e-4)


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match=r"trainer\.max_epochs or trainer\.max_steps"):
        configured(tiny(), math.inf)


def test_vectors_and_tokens_are_not_decayed_but_factors_and_the_head_are() -> None:
    module = tiny(optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.3))
    decay = rate_of(module, configured(module)["optimizer"], "weight_decay")
    assert set(decay) == {name for name, p in module.model.named_parameters() if p.requires_grad}
    factors = {name for name, _ in adapter_parameters(module.model)}
    assert factors
    for name, value in decay.items():
        assert value == (0.3 if name in factors or name == "head.weight" else 0.0), name
    assert decay["cls_token"] == decay["head.bias"] == 0.0


def test_all_layers_have_the_same_rate_unless_decayed() -> None:
    module = tiny()
    rates = rate_of(module, configured(module)["lr_scheduler"]["scheduler"].optimizer, "initial_lr")
    assert set(rates.values()) == {1e-3}


def test_layer_decay_lowers_the_rate_from_each_block_to_the_one_below() -> None:
    module = tiny(layer_decay=0.5, warmup=0.0)
    rates = rate_of(module, configured(module)["optimizer"])
    depth = len(module.model.blocks)
    assert rates["head.weight"] == pytest.approx(1e-3)
    for block in range(depth):
        of_block = [rate for name, rate in rates.items() if name.startswith(f"blocks.{block}.")]
        assert of_block == pytest.approx([1e-3 * 0.5 ** (depth - block)] * len(of_block)), block
        assert of_block
    assert rates["cls_token"] == pytest.approx(1e-3 * 0.5 ** (depth + 1))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_keeps_every_image_and_the_weight_of_its_targets(count: int, mixup: float, cutmix: float) -> None:
    module = tiny(mixup=mixup, cutmix=cutmix, label_smoothing=0.1)
    images, labels = batch(count)
    given = images.clone()
    mixed, targets = module._mixed(images, labels)
    assert mixed.shape == images.shape
    assert targets.shape == (count, 7)
    torch.testing.assert_close(targets.sum(-1), torch.ones(count))
    assert torch.equal(images, given)
    if count % 2:
        # timm mixes in pairs; the last image has no partner.
        assert torch.equal(mixed[-1], images[-1])
        smooth = F.one_hot(labels[-1], 7) * 0.9 + 0.1 / 7
        torch.testing.assert_close(targets[-1], smooth)
    if count > 1:
        assert not torch.equal(mixed[:2], images[:2])


@pytest.mark.parametrize("count", [1, 5])
def test_a_mixed_batch_of_any_size_trains(count: int) -> None:
    module = tiny(mixup=0.8, cutmix=1.0)
    fake_step(module)
    loss = module.training_step(batch(count), 0)
    loss.backward()
    assert loss.isfinite()
    assert module.model.head.weight.grad is not None


def test_label_smoothing_is_that_of_torch() -> None:
    module = tiny(label_smoothing=0.2)
    fake_step(module)
    images, labels = batch(4)
    expected = F.cross_entropy(module(images), labels, label_smoothing=0.2)
    torch.testing.assert_close(module.training_step((images, labels), 0), expected)


def test_classes_count_by_their_weights_with_and_without_mixing() -> None:
    weights = torch.tensor([0.5, 2.0, *[1.0] * 5])
    for settings in ({"label_smoothing": 0.2}, {"mixup": 0.8}):
        module = tiny(**settings)
        fake_step(module)
        images, labels = batch(4)
        module.loss_weights = weights
        torch.manual_seed(0)
        np.random.seed(0)
        found = module.training_step((images, labels), 0)
        np.random.seed(0)
        targets: Any = labels
        if module.mix is not None:
            images, targets = module._mixed(images, labels)
        expected = F.cross_entropy(module(images), targets, weights, label_smoothing=module.label_smoothing)
        torch.testing.assert_close(found, expected)


def test_a_batch_without_images_gives_a_loss_of_zero_and_zero_gradients_for_everything_trained() -> None:
    module = tiny(mixup=0.8)
    fake_step(module)
    loss = module.training_step(batch(0), 0)
    loss.backward()
    assert loss.item() == 0
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_evaluation_is_exact_over_batches_of_any_length_with_empty_ones(tmp_path: Path) -> None:
    module = tiny().eval()
    batches = [batch(4), batch(0), batch(3)]
    with torch.no_grad():
        logits = torch.cat([module(images) for images, _ in batches if len(images)])
    labels = torch.cat([labels for _, labels in batches])
    (scores,) = trainer(tmp_path).validate(module, DataLoader(batches, batch_size=None), verbose=False)
    best = logits.topk(5).indices
    assert scores["val/acc1"] == pytest.approx(float((best[:, 0] == labels).float().mean()))
    assert scores["val/acc5"] == pytest.approx(float((best == labels[:, None]).any(-1).float().mean()))
    assert scores["val/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


@pytest.mark.parametrize(("classes", "top_five"), [(3, False), (5, False), (6, True)])
def test_b6_with_five_classes_or_fewer_there_is_no_top_five(classes: int, top_five: bool, tmp_path: Path) -> None:
    module = tiny(num_classes=classes)
    loader = DataLoader([batch(6, classes)], batch_size=None)
    (scores,) = trainer(tmp_path).test(module, loader, verbose=False)
    assert ("test/acc5" in scores) == top_five
    assert 0 <= scores["test/acc1"] <= 1


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a11_a_split_without_a_readable_image_is_an_error(split: str, tmp_path: Path) -> None:
    loaders = {name: DataLoader([batch(0 if name == split else 4)] * 3, batch_size=None) for name in ("train", "val")}
    run = trainer(tmp_path, max_epochs=1, max_steps=-1, num_sanity_val_steps=1)
    start: Any = run.test if split == "test" else run.fit
    given = [DataLoader([batch(0)], batch_size=None)] if split == "test" else list(loaders.values())
    with pytest.raises(UserError, match=f"not one {split} image could be read"):
        start(tiny(), *given)


def test_a11_a_first_look_at_unreadable_images_alone_is_no_error(tmp_path: Path) -> None:
    val = DataLoader([batch(0), batch(4)], batch_size=None)
    run = trainer(tmp_path, max_epochs=1, max_steps=-1, num_sanity_val_steps=1)
    run.fit(tiny(), DataLoader([batch(4)], batch_size=None), val)
    assert run.callback_metrics["val/loss"] > 0


@pytest.mark.parametrize(
    ("backbone", "size"), [("vit_micro_patch4_32.mnist5k", 48), ("test_efficientnet", 40), ("test_vit", 64)]
)
def test_b1_a_backbone_takes_another_image_size_where_timm_can_resample(backbone: str, size: int) -> None:
    module = tiny(backbone=backbone, backbone_args=None, image_size=size, adapter=None)
    assert module(torch.randn(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("backbone", ["test_vit", "levit_128s"])
def test_b1_an_image_size_that_a_backbone_cannot_take_is_one_line(backbone: str) -> None:
    near = "take 32 x 32 or 48 x 48, or leave data.image_size out for its own"
    with pytest.raises(
        UserError, match=rf"'{backbone}' does not take images of 37 x 37 pixels \(.*\); {near}"
    ) as caught:
        tiny(backbone=backbone, backbone_args=None, image_size=37, adapter=None)
    assert "\n" not in str(caught.value)


def test_predictions_are_probabilities_also_of_no_image() -> None:
    module = tiny().eval()
    for count in (0, 3):
        probabilities = module.predict_step(batch(count), 0)
        assert probabilities.shape == (count, 7)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(count))


def test_training_leaves_the_statistics_of_frozen_batch_norms_as_they_were(tmp_path: Path) -> None:
    # Of this small network of convolutions the 1x1 ones are adapted.
    module = tiny(backbone="test_efficientnet", backbone_args=None, adapter=SnellConfig(rank=2))
    norms = {name: m for name, m in module.model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert norms
    before = {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms.items()}
    factors = {name: parameter.detach().clone() for name, parameter in adapter_parameters(module.model)}
    loader = DataLoader([batch(4), batch(4)], batch_size=None)
    trainer(tmp_path, max_epochs=2, max_steps=-1).fit(module, loader, DataLoader([batch(4)], batch_size=None))
    for name, norm in norms.items():
        assert torch.equal(norm.running_mean, before[name][0]), name
        assert torch.equal(norm.running_var, before[name][1]), name
        assert norm.num_batches_tracked == 0, name
    assert any(not torch.equal(parameter, factors[name]) for name, parameter in adapter_parameters(module.model))


def test_a_saved_module_is_the_same_after_loading(tmp_path: Path) -> None:
    module = tiny(label_smoothing=0.1, warmup=0.2)
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[AdapterCheckpoint(monitor=None)])
    run.fit(module, DataLoader([batch(4)], batch_size=None))
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["adapter"]["rank"] == 2
    assert "optimizer" not in checkpoint["hyper_parameters"]

    # These frozen weights are random: another seed makes others, the seed of before the same.
    torch.manual_seed(1)
    with pytest.raises(UserError, match="other frozen weights"):
        ImageClassifier.load_from_checkpoint(path, weights_only=True)
    torch.manual_seed(0)
    loaded = ImageClassifier.load_from_checkpoint(path, weights_only=True)
    assert (loaded.label_smoothing, loaded.warmup, loaded.adapter_config) == (0.1, 0.2, SMALL)
    images, _ = batch(2)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), module.eval()(images))


def test_a6_other_backbone_args_are_named_where_an_adapter_does_not_fit(tmp_path: Path) -> None:
    module = tiny()
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[AdapterCheckpoint(monitor=None)])
    run.fit(module, DataLoader([batch(4)], batch_size=None))
    path = str(tmp_path / "adapter.safetensors")
    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"made with model\.backbone_args .*, and the backbone has {.*init_values"):
        tiny(adapter_file=path, backbone_args={"img_size": 32, "init_values": 0.1})
    # With the file's own, it is the weights.
    with pytest.raises(UserError, match="other frozen weights"):
        tiny(adapter_file=path)


def test_a1_a_data_module_of_other_classes_is_refused_without_the_command_line(tmp_path: Path) -> None:
    class Data(LightningDataModule):
        def __init__(self, *names: str) -> None:
            super().__init__()
            self.class_names = names

        def train_dataloader(self) -> DataLoader:
            return DataLoader([batch(4)], batch_size=None)

        test_dataloader = train_dataloader

        def settings(self) -> dict[str, Any]:
            return {"classes": list(self.class_names)}

    names, others = tuple("abcdefg"), tuple("bcdefgz")
    module = tiny()
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[AdapterCheckpoint(monitor=None)])
    run.fit(module, datamodule=Data(*names))
    expected = "the tuned model's classes are a, b, c, d, e, f, g, and the data's are b, c, d, e, f, g, z"
    with pytest.raises(UserError, match=expected):
        trainer(tmp_path).test(module, datamodule=Data(*others), verbose=False)
    torch.manual_seed(0)
    fresh = tiny()
    checkpoint = {"ckpt_path": tmp_path / "checkpoints" / "last.ckpt", "weights_only": True}
    with pytest.raises(UserError, match=expected):
        trainer(tmp_path).test(fresh, datamodule=Data(*others), verbose=False, **checkpoint)


def test_a_checkpoint_that_lacks_or_adds_a_tensor_is_refused() -> None:
    module = tiny()
    made = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(made)
    name = "model.head.bias"
    lacking = {key: value for key, value in made["state_dict"].items() if key != name}
    with pytest.raises(UserError, match=r"the checkpoint lacks head\.bias"):
        module.on_load_checkpoint({**made, "state_dict": lacking})
    more = {**made["state_dict"], "model.extra": torch.zeros(1)}
    with pytest.raises(UserError, match="no place for extra of the checkpoint"):
        module.on_load_checkpoint({**made, "state_dict": more})
    with pytest.raises(UserError, match="was not written by snell_lightning"):
        module.on_load_checkpoint({"state_dict": made["state_dict"]})


def test_a_layer_that_the_backbone_does_not_call_is_named(tmp_path: Path) -> None:
    module = tiny()
    bypassed = module.model.blocks[1].attn.qkv
    # A backbone that does without the layer.
    bypassed.forward = lambda x: torch.cat([x, x, x], -1)
    with pytest.raises(UserError, match=r"blocks\.1\.attn\.qkv gets no gradient: 'test_vit'.*model\.adapter\.exclude"):
        trainer(tmp_path).fit(module, DataLoader([batch(2)], batch_size=None))


def test_c8_an_evaluation_makes_each_update_once_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, made = tiny(adapter=SnellConfig(rank=2, targets=["qkv"])), []
    write = UpdateRule.write
    monkeypatch.setattr(UpdateRule, "write", lambda *args, **kwargs: (made.append(1), write(*args, **kwargs))[1])
    loader = DataLoader([batch(2), batch(2), batch(1)], batch_size=None)
    run = trainer(tmp_path)
    for evaluate in (run.validate, run.test, run.predict):
        made.clear()
        evaluate(module, loader)
        # Of q, k and v of each block.
        assert len(made) == 3 * len(module.model.blocks)
    assert all(block.attn.qkv._made is None for block in module.model.blocks)


def test_a_checkpoint_of_a_compiled_backbone_is_that_of_a_plain_one(tmp_path: Path) -> None:
    def fresh() -> ImageClassifier:
        torch.manual_seed(0)
        return tiny()

    module = fresh()
    module.model = torch.compile(module.model, backend="eager")
    run = trainer(tmp_path, enable_checkpointing=True, callbacks=[AdapterCheckpoint(monitor=None)])
    run.fit(module, DataLoader([batch(4)], batch_size=None))
    path = tmp_path / "checkpoints" / "last.ckpt"
    names = torch.load(path, weights_only=True)["state_dict"].keys()
    assert names == {f"model.{name}" for name in adapter_state_dict(fresh().model)}
    for compiled in (False, True):
        other = fresh()
        if compiled:
            other.model = torch.compile(other.model, backend="eager")
        trainer(tmp_path).test(other, DataLoader([batch(4)], batch_size=None), ckpt_path=path, weights_only=True)
        found, expected = adapter_state_dict(other.model), adapter_state_dict(module.model)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_the_adapter_may_be_given_as_a_dictionary() -> None:
    module = tiny(adapter={"rank": 4, "targets": ["mlp"]})
    assert module.adapter_config == SnellConfig(rank=4, targets=["mlp"])
    assert module.hparams["adapter"]["rank"] == 4
    assert {name.split(".")[2] for name, _ in adapter_parameters(module.model)} == {"mlp"}


def test_without_an_adapter_only_the_head_is_trained() -> None:
    module = tiny(adapter=None)
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert trained == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, not 0"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be"),
        ({"mixup": -0.1}, "mixup must be at least 0"),
        ({"cutmix": -1.0}, "cutmix must be at least 0"),
        ({"adapter": {"rank": 3}}, "rank must be a positive multiple of pieces"),
    ],
)
def test_each_value_out_of_range_gets_one_line(arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        tiny(**arguments)
    assert "\n" not in str(caught.value)


class TestFrozenWeightsInBf16:
    def test_halve_the_adapted_layers_and_keep_the_fingerprint(self) -> None:
        torch.manual_seed(0)
        full = tiny()
        torch.manual_seed(0)
        half = tiny(backbone_dtype="bfloat16")

        layer = half.model.blocks[0].attn.qkv
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.weight, full.model.blocks[0].attn.qkv.weight.bfloat16())
        assert all(p.dtype == torch.float32 for p in half.parameters() if p.requires_grad)
        assert half.frozen_fingerprint == full.frozen_fingerprint

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_train_and_validate(self, precision: str, tmp_path: Path) -> None:
        module = tiny(backbone_dtype="bfloat16")
        before = [p.detach().clone() for _, p in adapter_parameters(module.model)]
        data = DataLoader([(image, label) for image, label in zip(*batch(8), strict=True)], batch_size=4)

        trainer(tmp_path, precision=precision, max_steps=2).fit(module, data, data)

        after = [p for _, p in adapter_parameters(module.model)]
        assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("recompute", ["none", "inputs", "blocks"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_validation_between_epochs_leaves_training_as_it_is(precision: str, recompute: str, tmp_path: Path) -> None:
    def trained(validate: bool) -> list[Tensor]:
        torch.manual_seed(0)
        module = tiny(adapter=SnellConfig(rank=2, recompute=recompute), optimizer=torch.optim.SGD)
        images, labels = torch.linspace(-1, 1, 8 * 3 * 32 * 32).view(8, 3, 32, 32), torch.arange(8) % 7
        data = DataLoader(list(zip(images, labels, strict=True)), batch_size=4)
        options = {"precision": precision, "max_steps": -1, "max_epochs": 2}
        torch.manual_seed(1)
        trainer(tmp_path, limit_val_batches=1.0 if validate else 0, **options).fit(module, data, data)
        return [parameter.detach() for _, parameter in adapter_parameters(module.model)]

    for one, other in zip(trained(True), trained(False), strict=True):
        assert torch.equal(one, other)


def test_d12_a_subclass_may_have_a_schedule_of_its_own(tmp_path: Path) -> None:
    class Stepped(ImageClassifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    torch.manual_seed(0)
    module = Stepped(backbone="test_vit", pretrained=False, num_classes=4, adapter=SMALL)
    run = trainer(tmp_path, max_epochs=2, max_steps=-1)
    run.fit(module, DataLoader([batch(4)], batch_size=None))
    assert run.global_step == 2
    assert run.optimizers[0].param_groups[0]["lr"] == 0.025
