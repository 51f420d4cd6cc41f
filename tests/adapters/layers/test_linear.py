"""A tuned layer against the straightforward reading of the method, by numbers, and the tools around it."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellLinear, UserError
from snell_lightning.adapters.layers.product import tuned_linear
from snell_lightning.adapters.update.competition import SPARSIFIERS
from snell_lightning.adapters.update.kernels import KERNELS
from tests.adapters import reference
from tests.adapters.layers.layer import gradients, make_layer, straightforward
from tests.adapters.reference import relative_error


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
