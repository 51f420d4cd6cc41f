"""Tuned layers without gradients."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snell_lightning.adapters import SnellLinear, updates_made_once
from snell_lightning.adapters.update.rule import UpdateRule
from tests.adapters.layers.layer import LOW_PRECISIONS, gradients, make_layer, straightforward


class TestEvaluation:
    @pytest.fixture
    def writes(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """One entry for every time an update was made."""
        made: list[int] = []
        write = UpdateRule.write

        def counted(*args: Any, **kwargs: Any) -> Any:
            made.append(1)
            return write(*args, **kwargs)

        monkeypatch.setattr(UpdateRule, "write", counted)
        return made

    @pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
    def test_makes_each_update_once_where_the_caller_says_so(self, autocast: bool, writes: list[int]) -> None:
        layer = make_layer(slices=3).eval()
        x = torch.randn(7, 12)

        with (
            updates_made_once(nn.Sequential(layer)),
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            first, second, third = layer(x), layer(x), layer(x[:2])

        assert len(writes) == 3
        assert torch.equal(first, second)
        torch.testing.assert_close(third, first[:2])

    @pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISIONS])
    def test_gives_what_training_without_noise_gives(self, dtype: torch.dtype) -> None:
        layer = make_layer(slices=3, dropout=0.0)
        x = torch.randn(2, 7, 12)

        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            trained = layer.train()(x).detach()
            with torch.no_grad():
                evaluated = layer.eval()(x)

        assert evaluated.dtype == trained.dtype
        torch.testing.assert_close(evaluated, trained)

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: torch.nn.init.normal_(layer.deltas[0].in_factors),
            lambda layer: torch.optim.SGD(layer.deltas.parameters(), lr=1.0).step(),
            lambda layer: layer.load_state_dict({k: v * 1.5 for k, v in layer.state_dict().items()}),
            lambda layer: setattr(layer.deltas[1], "sparsity", 0.1),
            lambda layer: (layer.weight.data.zero_(), layer.train().eval()),
        ],
        ids=["in place", "optimizer", "state dict", "sparsity", "train and back"],
    )
    def test_sees_every_change(self, change: Callable[[SnellLinear], object]) -> None:
        layer = make_layer(slices=3).eval()
        x = torch.randn(7, 12)
        for parameter in layer.deltas.parameters():
            parameter.grad = torch.randn_like(parameter)
        with torch.no_grad(), updates_made_once(layer):
            before = layer(x)

            change(layer)

            after = layer(x)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, straightforward(layer, x).detach())

    @pytest.mark.parametrize("inside", [False, True])
    def test_sees_a_change_behind_autograds_back(self, inside: bool) -> None:
        layer = make_layer(slices=3).eval()
        x = torch.randn(7, 12)
        with torch.no_grad(), updates_made_once(layer) if inside else nullcontext():
            before = layer(x)
        layer.deltas[0].in_factors.data.normal_()
        with torch.no_grad():
            after = layer(x)

        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, straightforward(layer, x).detach())

    def test_keeps_nothing_once_training_goes_on_or_the_evaluation_is_over(self) -> None:
        layer = make_layer().eval()
        x = torch.randn(7, 12)
        with torch.no_grad():
            layer(x)
            assert layer._made is None
            with updates_made_once(layer):
                layer(x)
                assert layer._made is not None
            assert layer._made is None
            with updates_made_once(layer):
                layer(x)
                layer.train()
                assert layer._made is None
                layer.eval()(x)
                assert layer._made is None

    def test_leaves_the_following_training_step_as_it_was(self) -> None:
        def gradients_after(evaluate: bool) -> list[Tensor]:
            torch.manual_seed(0)
            layer, x = make_layer(), torch.randn(7, 12)
            if evaluate:
                with torch.no_grad():
                    layer.eval()(x)
                layer.train()
            return gradients(layer, layer, x, torch.ones(7, 9))

        for one, other in zip(gradients_after(True), gradients_after(False), strict=True):
            assert torch.equal(one, other)

    def test_with_gradients_is_differentiable(self) -> None:
        layer = make_layer().eval()
        layer(torch.randn(7, 12)).sum().backward()
        assert layer.deltas[0].in_factors.grad is not None
