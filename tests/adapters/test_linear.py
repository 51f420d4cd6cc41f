"""The tuned layer: its numbers, what it keeps for backward, its noise, and low precision."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellLinear, UserError, cast_frozen, updates_made_once
from snell_lightning.adapters.layers.product import tuned_linear
from snell_lightning.adapters.update.competition import SPARSIFIERS
from snell_lightning.adapters.update.kernels import KERNELS
from snell_lightning.adapters.update.noise import Noise
from snell_lightning.adapters.update.rule import UpdateRule

from . import reference
from .reference import relative_error, relative_norm_error

LOW_PRECISIONS = [torch.bfloat16, torch.float16]


def make_layer(
    in_features: int = 12, out_features: int = 9, slices: int = 1, bias: bool = True, **settings: Any
) -> SnellLinear:
    """A layer of rank 4 whose updates are as large as its weights."""
    config = SnellConfig(**{"rank": 4, "sparsity": 0.5, "scale": 1.0, **settings})
    layer = SnellLinear(nn.Linear(in_features, out_features, bias=bias), config, slices)
    for delta in layer.deltas:
        nn.init.normal_(delta.in_factors)
        nn.init.normal_(delta.out_factors)
    return layer


def gradients(layer: SnellLinear, forward: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor) -> list[Tensor]:
    """Gradients of the input and of every factor."""
    x = x.detach().requires_grad_()
    return list(torch.autograd.grad(forward(x), [x, *layer.deltas.parameters()], grad_y))


def straightforward(layer: SnellLinear, x: Tensor, masks: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
    """The reference's output for the layer's tensors."""
    return reference.tuned(x, layer.weight.flatten(1), layer.bias, list(layer.deltas), masks)


def masks_of(noise: Noise, x: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of mean 1 that noise multiplies with: of entries `(rows, in)`, and of rows `(rows, 1)`."""
    rows = x.numel() // x.shape[-1]
    dropped = noise.dropped_entries(rows, x.shape[-1], x.device)
    entries = torch.ones(rows, x.shape[-1]) if dropped is None else (~dropped).float() / (1 - noise.dropout)
    samples = torch.full((rows, 1), 1 / (1 - noise.drop_path))
    for lost in noise.row_ranges(rows, len(x) if x.dim() > 1 else 1)[1]:
        samples[lost] = 0
    return entries, samples


class TestNumbers:
    @pytest.mark.parametrize("slices", [1, 3])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 7, 12), (2, 3, 5, 12)])
    def test_equal_the_reference_for_any_leading_dimensions(
        self, shape: tuple[int, ...], bias: bool, slices: int
    ) -> None:
        layer = make_layer(slices=slices, bias=bias)
        x, grad_y = torch.randn(shape), torch.randn(*shape[:-1], 9)

        assert layer(x).shape == (*shape[:-1], 9)
        assert relative_error(layer(x), straightforward(layer, x)) < 1e-5
        found = gradients(layer, layer, x, grad_y)
        expected = gradients(layer, lambda x: straightforward(layer, x), x, grad_y)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < 1e-5

    @pytest.mark.parametrize("sparsifier", SPARSIFIERS)
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_equal_the_reference_for_every_kernel_and_sparsifier(self, kernel: str, sparsifier: str) -> None:
        layer = make_layer(kernel=kernel, sparsifier=sparsifier, slices=3)
        x, grad_y = torch.randn(7, 12), torch.randn(7, 9)

        assert relative_error(layer(x), straightforward(layer, x)) < 1e-5
        found = gradients(layer, layer, x, grad_y)
        expected = gradients(layer, lambda x: straightforward(layer, x), x, grad_y)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < 1e-5

    @pytest.mark.parametrize(
        "view",
        [
            lambda x: x.transpose(0, 1),
            lambda x: x[:, ::2],
            lambda x: x[:, :1].expand(-1, 6, -1),
            lambda x: x.flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2),
        ],
        ids=["transposed", "strided", "expanded", "column-major"],
    )
    def test_equal_the_reference_for_inputs_that_are_not_contiguous(self, view: Callable[[Tensor], Tensor]) -> None:
        layer = make_layer()
        x = view(torch.randn(4, 6, 12))
        assert not x.is_contiguous()
        grad_y = torch.randn(9, *x.shape[:-1]).movedim(0, -1)

        assert relative_error(layer(x), straightforward(layer, x)) < 1e-5
        found = gradients(layer, layer, x, grad_y)
        expected = gradients(layer, lambda x: straightforward(layer, x), x, grad_y)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < 1e-5

    @pytest.mark.parametrize("noise", [0.0, 0.5])
    @pytest.mark.parametrize("shape", [(0, 12), (0, 5, 12), (2, 0, 12)])
    def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(
        self, shape: tuple[int, ...], noise: float
    ) -> None:
        layer = make_layer(dropout=noise, drop_path=noise)
        x = torch.randn(shape, requires_grad=True)

        y = layer(x)
        y.sum().backward()

        assert y.shape == (*shape[:-1], 9)
        assert x.grad.shape == shape
        assert all(not parameter.grad.any() for parameter in layer.deltas.parameters())

    def test_each_slice_has_its_own_competition(self) -> None:
        layer = make_layer(slices=3, sparsifier="hard")
        # Entries of the first slice are far larger: in one common competition the other slices would lose
        # nearly all.
        layer.deltas[0].out_factors.data.mul_(100)
        x = torch.randn(5, 12)
        expected = torch.cat(
            [
                tuned_linear(x, layer.weight[rows], layer.bias[rows], [delta])
                for rows, delta in zip((slice(0, 3), slice(3, 6), slice(6, 9)), layer.deltas, strict=True)
            ],
            dim=-1,
        )

        torch.testing.assert_close(layer(x), expected)
        for delta in layer.deltas:
            assert delta.weight().shape == (3, 12)
            assert (delta.weight() == 0).sum() == 18  # of 36: floor(0.5 * 35) + 1

    def test_slices_may_have_sparsities_of_their_own(self) -> None:
        layer = make_layer(slices=3)
        for delta, sparsity in zip(layer.deltas, (0.0, 0.5, 0.9), strict=True):
            delta.sparsity = sparsity
        x, grad_y = torch.randn(5, 12), torch.randn(5, 9)

        found = gradients(layer, layer, x, grad_y)
        expected = gradients(layer, lambda x: straightforward(layer, x), x, grad_y)

        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < 1e-5

    def test_only_the_updates_are_trainable_at_first(self) -> None:
        layer = make_layer(slices=3)

        trainable = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}

        assert trainable == {f"deltas.{i}.{name}_factors" for i in range(3) for name in ("in", "out")}

    def test_weight_and_bias_get_their_gradient_where_asked_for(self) -> None:
        layer = make_layer()
        layer.requires_grad_(True)
        x, grad_y = torch.randn(2, 5, 12), torch.randn(2, 5, 9)

        found = torch.autograd.grad(layer(x), list(layer.parameters()), grad_y)
        expected = torch.autograd.grad(straightforward(layer, x), list(layer.parameters()), grad_y)

        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < 1e-5

    def test_two_half_batches_accumulate_to_the_whole(self) -> None:
        layer = make_layer(slices=3)
        x, target = torch.randn(8, 5, 12), torch.randn(8, 5, 9)
        F.mse_loss(layer(x), target).backward()
        whole = [parameter.grad.clone() for parameter in layer.deltas.parameters()]

        layer.zero_grad()
        for half in (slice(0, 4), slice(4, 8)):
            (F.mse_loss(layer(x[half]), target[half]) / 2).backward()

        for parameter, expected in zip(layer.deltas.parameters(), whole, strict=True):
            assert relative_error(parameter.grad, expected) < 1e-5

    def test_a_second_derivative_is_refused(self) -> None:
        layer = make_layer()
        x = torch.randn(5, 12, requires_grad=True)
        (grad_x,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)

        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad_x.sum().backward()

    def test_the_output_may_be_changed_in_place(self) -> None:
        layer = make_layer()
        x, grad_y = torch.randn(2, 5, 12), torch.randn(2, 5, 9)

        found = gradients(layer, lambda x: F.relu(layer(x), inplace=True), x, grad_y)
        expected = gradients(layer, lambda x: F.relu(straightforward(layer, x)), x, grad_y)

        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < 1e-5

    @pytest.mark.parametrize("precision", ["high", "medium"])
    def test_reduced_product_precision_keeps_the_update(self, precision: str) -> None:
        layer = make_layer()
        x = torch.randn(5, 12)
        expected = straightforward(layer, x)

        torch.set_float32_matmul_precision(precision)

        # Products of this precision have 8 bits or more: 4e-3 for each factor.
        assert relative_error(layer(x), expected) < 2e-2


class TestConvolution:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("stride", [1, 2, (2, 1)])
    def test_equals_the_convolution_with_weight_and_update(self, stride: int | tuple[int, int], bias: bool) -> None:
        conv = nn.Conv2d(12, 9, 1, stride=stride, bias=bias)
        layer = SnellLinear(conv, SnellConfig(rank=4, sparsity=0.5, scale=1.0))
        nn.init.normal_(layer.deltas[0].in_factors)

        def reference_convolution(x: Tensor) -> Tensor:
            update = reference.update(layer.deltas[0])[:, :, None, None]
            return F.conv2d(x, layer.weight + update, layer.bias, stride=stride)

        x = torch.randn(2, 12, 5, 6)
        expected_y = reference_convolution(x)
        grad_y = torch.randn_like(expected_y)

        assert relative_error(layer(x), expected_y) < 1e-5
        found = gradients(layer, layer, x, grad_y)
        expected = gradients(layer, reference_convolution, x, grad_y)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < 1e-5

    def test_merges_into_a_convolution_of_the_same_output(self) -> None:
        conv = nn.Conv2d(12, 9, 1, stride=2)
        layer = SnellLinear(conv, SnellConfig(rank=4, sparsity=0.5, scale=1.0))
        x = torch.randn(2, 12, 5, 6)
        expected = layer(x)

        merged = layer.merged()

        assert isinstance(merged, nn.Conv2d)
        torch.testing.assert_close(merged(x), expected)

    @pytest.mark.parametrize(
        ("layer", "reason"),
        [
            (nn.Conv2d(8, 8, 1, groups=2), "grouped convolution"),
            (nn.Conv2d(8, 8, 3), "3x3 convolution"),
            (nn.Conv2d(8, 8, 1, padding=1), "padding"),
            (nn.LayerNorm(8), "only linear layers and 1x1 convolutions"),
            (nn.MultiheadAttention(8, 2).out_proj, "MultiheadAttention"),
        ],
    )
    def test_other_layers_are_refused_with_the_reason(self, layer: nn.Module, reason: str) -> None:
        with pytest.raises(UserError, match=reason):
            SnellLinear(layer, SnellConfig(rank=4))

    def test_outputs_that_cannot_be_divided_into_slices_are_refused(self) -> None:
        with pytest.raises(UserError, match="9 outputs cannot be divided into 2 slices"):
            SnellLinear(nn.Linear(12, 9), SnellConfig(rank=4), slices=2)


def kept_for_backward(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: Iterator[Tensor]) -> dict[int, int]:
    """Bytes of each storage that lives until backward and belongs to no parameter, by its address.

    Counts what autograd saves, and tensors that hang on the graph's nodes in some other way.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    tensors: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(x)
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        tensors += tensors_in(list(getattr(node, "__dict__", {}).values()))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return {address: size for address, size in storages.items() if address not in known}


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


class TestMemory:
    # The weight has 96 * 192 * 4 = 73,728 bytes, the input 8 * 96 * 4 = 3,072, the factors 2 * (96 + 192) *
    # 2 * 4 = 4,608 or more; a threshold has 4, and 64 are allowed for each.
    IN, OUT, ROWS = 96, 192, 8

    @pytest.mark.parametrize("slices", [1, 3])
    @pytest.mark.parametrize("sparsifier", SPARSIFIERS)
    @pytest.mark.parametrize("noise", [{}, {"dropout": 0.1, "drop_path": 0.1}], ids=["plain", "noise"])
    def test_nothing_but_the_input_and_thresholds_is_kept_for_backward(
        self, noise: dict[str, float], sparsifier: str, slices: int
    ) -> None:
        layer = make_layer(self.IN, self.OUT, slices, sparsifier=sparsifier, **noise)
        x = torch.randn(self.ROWS, self.IN, requires_grad=True)

        kept = kept_for_backward(layer, x, layer.parameters())

        assert kept.pop(x.untyped_storage().data_ptr()) == self.ROWS * self.IN * 4
        assert sum(kept.values()) <= 64 * slices

    @pytest.mark.parametrize("noise", [{}, {"dropout": 0.1, "drop_path": 0.1}], ids=["plain", "noise"])
    def test_under_autocast_the_input_is_kept_in_low_precision_alone(self, noise: dict[str, float]) -> None:
        layer = make_layer(self.IN, self.OUT, **noise)
        x = torch.randn(self.ROWS, self.IN, requires_grad=True)

        with torch.autocast("cpu", dtype=torch.bfloat16):
            kept = kept_for_backward(layer, x, layer.parameters())

        assert self.ROWS * self.IN * 2 <= sum(kept.values()) <= self.ROWS * self.IN * 2 + 64

    def test_the_update_alone_keeps_only_its_threshold(self) -> None:
        (delta,) = make_layer(self.IN, self.OUT).deltas

        kept = kept_for_backward(lambda _: delta.weight(), torch.empty(0), delta.parameters())

        assert sum(kept.values()) <= 64

    def test_the_count_would_see_a_matrix_of_the_weights_size(self) -> None:
        layer = make_layer(self.IN, self.OUT)
        x = torch.randn(self.ROWS, self.IN, requires_grad=True)

        kept = kept_for_backward(lambda x: straightforward(layer, x), x, layer.parameters())

        assert self.IN * self.OUT * 4 in kept.values()


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
    def test_c8_sees_a_change_behind_autograds_back(self, inside: bool) -> None:
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


class TestTooling:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_a_compiled_model_gives_the_same_numbers(self, backend: str) -> None:
        model = nn.Sequential(make_layer(12, 9), nn.GELU(), make_layer(9, 6, slices=3))
        x = torch.randn(5, 12)
        model(x).square().sum().backward()
        expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        expected_y = model(x)
        model.zero_grad()

        compiled = torch.compile(model, backend=backend)
        y = compiled(x)
        y.square().sum().backward()

        torch.testing.assert_close(y, expected_y)
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        # 1 + 3 updates of two factors each.
        assert len(found) == len(expected) == 8
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
    )
    def test_a_copy_is_equal_and_independent(self, copied: Callable[[SnellLinear], SnellLinear]) -> None:
        layer, x = make_layer(slices=3), torch.randn(5, 12)
        layer.deltas[1].sparsity = 0.8
        before = layer(x)

        twin = copied(layer)

        assert torch.equal(twin(x), before)
        assert twin.deltas[1].sparsity == 0.8
        nn.init.zeros_(twin.weight)
        nn.init.normal_(twin.deltas[0].in_factors)
        assert torch.equal(layer(x), before)
        torch.testing.assert_close(twin.merged()(x), twin(x))

    def test_a_saved_state_dict_loads_with_weights_only(self) -> None:
        layer, twin, x = make_layer(slices=3), make_layer(slices=3), torch.randn(5, 12)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)

        twin.load_state_dict(torch.load(file, weights_only=True))

        assert torch.equal(twin(x), layer(x))
        assert list(layer.state_dict())[:2] == ["weight", "bias"]

    def test_a_change_of_type_or_mode_reaches_the_merged_layer(self) -> None:
        layer = make_layer().double().eval()
        x = torch.randn(5, 12, dtype=torch.float64)

        merged = layer.merged()

        assert merged.weight.dtype == torch.float64
        assert not merged.training
        torch.testing.assert_close(merged(x), layer(x))
