"""Tuned layers in low precision, and frozen weights held in bf16."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellLinear, cast_frozen
from snell_lightning.adapters.update.noise import Noise
from tests.adapters import reference
from tests.adapters.layers.layer import LOW_PRECISIONS, gradients, make_layer, masks_of, straightforward
from tests.adapters.reference import relative_norm_error


class TestLowPrecision:
    @pytest.mark.parametrize("dtype", LOW_PRECISIONS)
    def test_output_has_the_type_that_a_linear_layer_gives(self, dtype: torch.dtype) -> None:
        layer, plain, x = make_layer(), nn.Linear(12, 9), torch.randn(5, 12)

        with torch.autocast("cpu", dtype=dtype):
            assert layer(x).dtype == plain(x).dtype == dtype
            assert layer(x.double()).dtype == torch.float64
        assert layer(x).dtype == torch.float32
        assert layer.to(dtype)(x.to(dtype)).dtype == dtype

    @pytest.mark.parametrize("noise", [0.0, 0.3])
    @pytest.mark.parametrize("dtype", LOW_PRECISIONS)
    def test_a_small_update_of_a_zero_weight_is_the_fp32_one(self, dtype: torch.dtype, noise: float) -> None:
        layer = make_layer(64, 48, scale=1e-7, bias=False, dropout=noise, drop_path=noise)
        nn.init.zeros_(layer.weight)
        x = torch.randn(256, 64).to(dtype).float()
        assert layer.deltas[0].weight().abs().max() < 1e-6

        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=dtype):
            found = layer(1000 * x)
        torch.manual_seed(1)
        masks = masks_of(Noise.draw(noise, noise), x) if noise else (None, None)
        expected = straightforward(layer, 1000 * x, masks)

        assert relative_norm_error(found, expected) < 0.02

    def test_fp16_keeps_updates_below_its_own_range(self) -> None:
        # fp16 numbers below 6e-5 lose digits and below 6e-8 are zero.
        layer = make_layer(64, 48, sparsifier="hard", scale=2e-8, bias=False)
        nn.init.zeros_(layer.weight)
        update = layer.deltas[0].weight()
        assert 2e-8 < update.abs().max() < 3e-7
        assert relative_norm_error(update.half(), update) > 0.2
        x = 1e4 * torch.randn(256, 64)

        with torch.autocast("cpu", dtype=torch.float16):
            found = layer(x)

        assert relative_norm_error(found, straightforward(layer, x)) < 0.02

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", LOW_PRECISIONS)
    def test_a_small_update_of_a_real_weight_survives_on_average(self, dtype: torch.dtype, bias: bool) -> None:
        # Weights are about 0.03 and outputs about 0.5, where bf16 has a spacing of 2e-3: the update's part
        # of 2e-5 is far below it in every single output, but not lost on average over 4,096 of them times
        # 256 outputs.
        layer = make_layer(256, 256, sparsifier="hard", scale=1e-6, bias=bias)
        x = torch.randn(4096, 256)
        part = F.linear(x, layer.deltas[0].weight())
        assert 1e-6 < part.abs().mean() < 5e-5

        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            tuned = layer(x).float()
            nn.init.zeros_(layer.deltas[0].in_factors)
            nn.init.zeros_(layer.deltas[0].out_factors)
            untuned = layer(x).float()

        # The share of the update's part that the outputs contain: rounding errors of 6e-4 against parts of
        # 2e-5, averaged over a million outputs, leave it uncertain by 0.03.
        share = ((tuned - untuned) * part).sum() / part.square().sum()
        assert share.item() == pytest.approx(1, abs=0.15)

    def test_merging_into_a_low_precision_weight_would_lose_a_small_update(self) -> None:
        # What the two products are for: next to weights of about 0.03, with a spacing of 1e-4, most entries
        # of 1e-5 vanish.
        layer = make_layer(256, 256, sparsifier="hard", scale=1e-5)
        low = layer.weight.bfloat16()
        update = layer.deltas[0].weight()

        merged = (low.float() + update).bfloat16()

        assert relative_norm_error(merged.float() - low.float(), update) > 0.5

    @pytest.mark.parametrize("noise", [0.0, 0.3])
    @pytest.mark.parametrize("dtype", LOW_PRECISIONS)
    def test_gradients_are_close_to_those_of_fp32(self, dtype: torch.dtype, noise: float) -> None:
        layer = make_layer(64, 48, slices=3, dropout=noise, drop_path=noise)
        x, grad_y = torch.randn(8, 16, 64).to(dtype).float(), torch.randn(8, 16, 48).to(dtype).float()

        def autocast(x: Tensor) -> Tensor:
            torch.manual_seed(1)
            with torch.autocast("cpu", dtype=dtype):
                return layer(x).float()

        def expected(x: Tensor) -> Tensor:
            torch.manual_seed(1)
            return straightforward(layer, x, masks_of(Noise.draw(noise, noise), x) if noise else (None, None))

        found_gradients = gradients(layer, autocast, x, grad_y)
        expected_gradients = gradients(layer, expected, x, grad_y)

        # bf16 has 8 bits: rounding errors of 0.2 % a factor, of which few are combined.
        for one, other in zip(found_gradients, expected_gradients, strict=True):
            assert one.dtype == torch.float32
            assert relative_norm_error(one, other) < 0.02

    def test_a_frozen_weight_in_bf16_keeps_factors_and_kernel_in_fp32(self) -> None:
        layer = SnellLinear(nn.Linear(64, 48).bfloat16(), SnellConfig(rank=4, scale=1.0))
        x = torch.randn(5, 64)

        y = layer(x.bfloat16())

        assert y.dtype == torch.bfloat16
        assert layer.deltas[0].in_factors.dtype == layer.deltas[0].weight().dtype == torch.float32
        full = reference.tuned(x, layer.weight.float(), layer.bias.float(), list(layer.deltas))
        assert relative_norm_error(y, full) < 0.02
        assert layer.merged().weight.dtype == torch.float32


class TestFrozenWeightsInBf16:
    def test_are_half_as_large_and_the_factors_stay_in_fp32(self) -> None:
        model = nn.Sequential(make_layer(slices=3))
        before = model[0].weight.nbytes

        cast_frozen(model, torch.bfloat16)

        assert model[0].weight.dtype == torch.bfloat16
        assert model[0].weight.nbytes * 2 == before
        assert {p.dtype for p in model[0].deltas.parameters()} == {torch.float32}
        assert model[0].bias.dtype == torch.float32

    @pytest.mark.parametrize("noise", [0.0, 0.3])
    @pytest.mark.parametrize("training", [True, False])
    def test_compute_in_the_inputs_type_with_the_rounded_weight(self, training: bool, noise: float) -> None:
        layer = make_layer(slices=3, dropout=noise)
        exact = copy.deepcopy(layer)
        exact.weight.data = exact.weight.data.bfloat16().float()
        cast_frozen(nn.Sequential(layer), torch.bfloat16)
        x, grad_y = torch.randn(7, 12), torch.randn(7, 9)

        def seeded(module: SnellLinear) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                torch.manual_seed(1)
                return module.train(training)(x)

            return run

        assert torch.equal(seeded(layer)(x), seeded(exact)(x))
        for one, other in zip(
            gradients(layer, seeded(layer), x, grad_y), gradients(exact, seeded(exact), x, grad_y), strict=True
        ):
            assert torch.equal(one, other)

    def test_merge_into_fp32_with_the_update_whole(self) -> None:
        layer = make_layer()
        cast_frozen(nn.Sequential(layer), torch.bfloat16)
        expected = layer.weight.float() + layer.deltas[0].weight()

        assert torch.equal(layer.merged().weight, expected)
