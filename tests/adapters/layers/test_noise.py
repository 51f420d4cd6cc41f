"""Dropout and drop path of an update."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_lightning.adapters.layers.product import tuned_linear
from snell_lightning.adapters.update.noise import Noise
from tests.adapters.layers.layer import gradients, make_layer, masks_of, straightforward
from tests.adapters.reference import relative_error, relative_norm_error


class TestNoise:
    @pytest.mark.parametrize("slices", [1, 3])
    @pytest.mark.parametrize(("dropout", "drop_path"), [(0.3, 0.0), (0.0, 0.3), (0.3, 0.4)])
    @pytest.mark.parametrize("shape", [(12,), (7, 12), (4, 7, 12), (4, 3, 5, 12)])
    def test_backward_uses_the_masks_of_forward(
        self, shape: tuple[int, ...], dropout: float, drop_path: float, slices: int
    ) -> None:
        layer = make_layer(slices=slices, dropout=dropout, drop_path=drop_path).train()
        x, grad_y = torch.randn(shape), torch.randn(*shape[:-1], 9)

        def seeded(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                torch.manual_seed(5)
                return forward(x)

            return run

        def expected(x: Tensor) -> Tensor:
            return straightforward(layer, x, masks_of(Noise.draw(dropout, drop_path), x))

        assert relative_error(seeded(layer)(x), seeded(expected)(x)) < 1e-5
        found_gradients = gradients(layer, seeded(layer), x, grad_y)
        expected_gradients = gradients(layer, seeded(expected), x, grad_y)
        for one, other in zip(found_gradients, expected_gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("dropout", "drop_path"), [(0.5, 0.0), (0.0, 0.5), (0.3, 0.3)])
    def test_gradient_is_the_derivative_for_fixed_noise(self, dropout: float, drop_path: float) -> None:
        layer = make_layer(5, 4, sparsifier="hard").double()
        x = torch.randn(4, 2, 5, dtype=torch.float64, requires_grad=True)
        noise = Noise(dropout, drop_path, seed=3)

        assert torch.autograd.gradcheck(
            lambda x, *_: tuned_linear(x, layer.weight, layer.bias, list(layer.deltas), noise),
            (x, *layer.deltas.parameters()),
        )

    def test_masks_have_mean_one_and_drop_the_given_fraction(self) -> None:
        entries, samples = masks_of(Noise(dropout=0.1, drop_path=0.2, seed=0), torch.empty(20_000, 2, 12))

        # Of 480,000 entries a tenth falls: the fraction has a standard deviation of 4e-4. Of 20,000 samples
        # a fifth falls: 2.8e-3. Tolerances are five of them; a mean is the kept fraction over the
        # probability to keep.
        assert (entries == 0).float().mean().item() == pytest.approx(0.1, abs=2.2e-3)
        assert entries.mean().item() == pytest.approx(1, abs=2.4e-3)
        assert (samples == 0).float().mean().item() == pytest.approx(0.2, abs=1.4e-2)
        assert samples.mean().item() == pytest.approx(1, abs=1.8e-2)

    def test_drop_path_drops_whole_samples_and_spares_the_frozen_product(self) -> None:
        layer = make_layer(drop_path=0.5).train()
        x = torch.randn(64, 7, 12)
        frozen = F.linear(x, layer.weight, layer.bias)
        update = F.linear(x, layer.deltas[0].weight())

        extra = layer(x) - frozen

        dropped = extra.abs().amax(dim=(1, 2)) < 1e-5
        # Of 64 samples half falls, with a standard deviation of 4.
        assert 12 <= dropped.sum() <= 52
        # What is kept is divided by the probability to keep.
        torch.testing.assert_close(extra[~dropped], 2 * update[~dropped], rtol=1e-4, atol=1e-4)

    def test_dropout_acts_on_the_updates_input_alone(self) -> None:
        layer = make_layer(dropout=0.5, bias=False).train()
        nn.init.zeros_(layer.deltas[0].out_factors)
        nn.init.zeros_(layer.deltas[0].in_factors)
        x = torch.randn(64, 12)

        torch.testing.assert_close(layer(x), F.linear(x, layer.weight))

    def test_output_is_right_on_average(self) -> None:
        layer = make_layer(dropout=0.1, drop_path=0.1).train()
        x = torch.randn(1, 12)
        mean = layer(x.repeat(20_000, 1)).mean(0)

        # An output of this layer spreads by about its own size, so the mean of 20,000 is within about 1 %
        # of it.
        assert relative_norm_error(mean, layer.eval()(x)[0]) < 0.04

    def test_evaluation_has_no_noise(self) -> None:
        layer = make_layer(dropout=0.5, drop_path=0.5).eval()
        x = torch.randn(7, 12)

        assert torch.equal(layer(x), layer(x))
        assert relative_error(layer(x), straightforward(layer, x)) < 1e-5

    @pytest.mark.parametrize(("dropout", "drop_path"), [(0.5, 0.0), (0.0, 0.5)])
    def test_every_call_has_its_own_noise_and_a_seed_repeats_it(self, dropout: float, drop_path: float) -> None:
        layer = make_layer(dropout=dropout, drop_path=drop_path).train()
        x = torch.randn(64, 12)

        torch.manual_seed(1)
        first, second = layer(x), layer(x)
        torch.manual_seed(1)
        again = layer(x)

        assert not torch.equal(first, second)
        assert torch.equal(first, again)

    def test_backward_leaves_the_random_state_alone(self) -> None:
        layer = make_layer(dropout=0.5, drop_path=0.5).train()
        y = layer(torch.randn(7, 12))
        before = torch.get_rng_state()

        y.sum().backward()

        assert torch.equal(torch.get_rng_state(), before)

    def test_no_noise_draws_no_random_number(self) -> None:
        layer = make_layer().train()
        x = torch.randn(7, 12)
        before = torch.get_rng_state()

        layer(x)

        assert torch.equal(torch.get_rng_state(), before)
