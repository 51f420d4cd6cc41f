"""Issue row C3: running statistics of what is frozen stay, whoever calls `train()`; what is trained keeps its own."""

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_lightning.adapters import (
    SnellConfig,
    adapter_state_dict,
    fingerprint,
    freeze_all_but_head,
    freeze_statistics,
    inject,
    load_adapter_state_dict,
    merge,
)

from .models import enlarge, make_images, make_model

NORMS = ("running_mean", "running_var", "num_batches_tracked")


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.rpartition(".")[2] in NORMS}


def train(model: nn.Module, images: Tensor, steps: int = 3) -> None:
    """A loop of one's own."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(steps):
        loss = F.cross_entropy(model(images), torch.arange(len(images)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adapted(recompute: str = "inputs", **settings: object) -> nn.Module:
    model = make_model("efficientnet").train()
    inject(model, SnellConfig(rank=2, scale=1.0, recompute=recompute, **settings))
    torch.manual_seed(0)
    return enlarge(model, lambda factors: nn.init.normal_(factors, std=0.1))


class TestFrozen:
    @pytest.mark.parametrize("recompute", ["none", "inputs", "blocks"])
    def test_stay_in_a_loop_that_calls_train(self, recompute: str) -> None:
        model = adapted(recompute)
        before = statistics(model)
        assert before
        train(model, make_images("efficientnet"))
        assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
        assert model.training
        assert model.blocks[0].training

    def test_make_a_reloaded_model_equal(self) -> None:
        images = make_images("efficientnet")
        model = adapted()
        train(model, images)
        state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
        other = adapted()
        load_adapter_state_dict(other, state)
        assert fingerprint(other) == fingerprint(model)
        with torch.no_grad():
            assert torch.equal(other.eval()(images), model.eval()(images))

    def test_stay_where_the_head_alone_is_trained(self) -> None:
        model = make_model("efficientnet")
        freeze_all_but_head(model)
        before = statistics(model)
        train(model, make_images("efficientnet"))
        assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    def test_stay_in_a_copy_which_is_bound_to_itself(self, copied: Callable[[nn.Module], nn.Module]) -> None:
        model = adapted()
        other = copied(model)
        train(other, make_images("efficientnet"))
        assert all(torch.equal(value, statistics(other)[name]) for name, value in statistics(model).items())
        assert other.bn1.train(True) is other.bn1

    def test_are_frozen_for_every_kind_that_has_them(self) -> None:
        kinds = [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True), timm.layers.BatchNormAct2d(4)]
        kinds += [timm.layers.EvoNorm2dB0(4), nn.BatchNorm2d(4, affine=False)]
        for norm in kinds:
            model = nn.ModuleDict({"0": nn.Sequential(norm, nn.Conv2d(4, 4, 1))})
            inject(model, SnellConfig(rank=2))
            before = statistics(model)
            assert before
            model.train()
            model["0"](torch.randn(2, 4, 3, 3))
            assert all(torch.equal(value, before[name]) for name, value in statistics(model).items()), norm

    def test_stay_in_norms_that_a_strategy_puts_in(self) -> None:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(adapted())
        assert isinstance(model.bn2, nn.SyncBatchNorm)
        freeze_statistics(model)
        before = statistics(model)
        train(model, make_images("efficientnet"))
        assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())

    def test_are_an_ordinary_norms_again_after_merging(self) -> None:
        model = merge(adapted())
        assert model.bn1.training
        before = statistics(model)
        model.train()(make_images("efficientnet"))
        assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])
        assert "train" not in vars(model.bn1)


class TestTrained:
    def test_move_and_are_kept_with_what_is_trained(self) -> None:
        images = make_images("efficientnet")
        model = adapted(train_also=[r"^bn2\."])
        before = statistics(model)
        train(model, images)
        moved = {name for name, value in statistics(model).items() if not torch.equal(value, before[name])}
        assert moved == {f"bn2.{name}" for name in NORMS} <= adapter_state_dict(model).keys()

        other = adapted(train_also=[r"^bn2\."])
        load_adapter_state_dict(other, adapter_state_dict(model))
        assert fingerprint(other) == fingerprint(model)
        with torch.no_grad():
            assert torch.equal(other.eval()(images), model.eval()(images))
