"""Keeping less for backward: the same gradients bit for bit, fewer bytes, and nothing left behind after merging."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellLinear, UserError, inject, merge
from snell_lightning.adapters.finding import blocks_of
from tests.adapters.models import FAMILIES, enlarge, large_config, make_images, make_model


def adapted(family: str, recompute: str, **settings: object) -> nn.Module:
    """The family's model with large updates, in training mode."""
    model = make_model(family)
    inject(model, large_config(recompute=recompute, **settings))
    torch.manual_seed(2)
    return enlarge(model).train()


def kept_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass: each storage once, the model's own tensors left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    sizes = {pointer: tensor.untyped_storage().nbytes() for pointer, tensor in kept.items()}
    output.sum().backward()
    return sum(sizes.values())


def gradients_of(model: nn.Module, images: Tensor, autocast: bool = False) -> list[Tensor]:
    """Gradients of all that is trained, for a fixed seed of the noise."""
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images)
        logits = sum(logits) if isinstance(logits, tuple) else logits
        loss = F.cross_entropy(logits.float(), torch.arange(len(images)))
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


class Block(nn.Module):
    """A transformer block without attention's product: what it keeps is known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.fc1, self.act, self.drop, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.0), None
        self.fc2 = nn.Linear(4 * width, width)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        n = self.norm1(x)
        x = x + self.q(n) + self.k(n) + self.v(n)
        return x + self.fc2(self.drop(self.act(self.fc1(self.norm2(x)))))


class Stack(nn.Module):
    """Blocks behind a trainable first layer, so that gradients flow through all of them."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.first(x))


def stack(recompute: str, **settings: object) -> Stack:
    torch.manual_seed(0)
    model = Stack()
    inject(model, large_config(recompute=recompute, train_also=[r"^first\."], **settings))
    return enlarge(model).train()


def module_of(layers: list[str]) -> nn.Module:
    """A model with layers of these names."""
    model = nn.Module()
    for layer in layers:
        module = model
        *parents, last = layer.split(".")
        for part in parents:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.add_module(last, nn.Linear(2, 2))
    return model


class TestGradients:
    # In fp32 and without noise every module of timm is tried, in tests/backbones.
    @pytest.mark.parametrize(
        ("autocast", "noise"),
        [(True, {}), (False, {"dropout": 0.3, "drop_path": 0.3})],
        ids=["bf16", "noise"],
    )
    @pytest.mark.parametrize("recompute", ["inputs", "blocks"])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_are_those_of_keeping_everything_bit_for_bit(
        self, family: str, recompute: str, autocast: bool, noise: dict[str, float]
    ) -> None:
        images = make_images(family)
        expected = gradients_of(adapted(family, "none", **noise), images, autocast)

        found = gradients_of(adapted(family, recompute, **noise), images, autocast)

        assert len(found) == len(expected) > 0
        assert any(gradient.any() for gradient in expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)

    def test_an_output_that_was_changed_in_place_is_kept_as_it_is(self) -> None:
        class Shifted(Block):
            def forward(self, x: Tensor) -> Tensor:
                return x + self.fc1(self.norm1(x).add_(1.0)).mean(-1, keepdim=True)

        def gradients(recompute: str) -> list[Tensor]:
            torch.manual_seed(0)
            model = Stack()
            model.blocks[0] = Shifted(32)
            inject(model, large_config(recompute=recompute, train_also=[r"^first\."]))
            enlarge(model).train()(torch.linspace(-1, 1, 64).view(2, 32)).square().sum().backward()
            return [p.grad for p in model.parameters() if p.grad is not None]

        for one, other in zip(gradients("inputs"), gradients("none"), strict=True):
            assert torch.equal(one, other)

    def test_a_kept_tensor_that_is_changed_before_backward_is_an_error(self) -> None:
        model = stack("inputs")
        x = torch.randn(4, 32, requires_grad=True)
        h = model.first(x)
        y = model.blocks[0](h)
        h.data.add_(1.0)  # not seen by anyone
        h.add_(1.0)

        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_the_module_may_be_called_again_before_backward(self) -> None:
        def gradients(recompute: str) -> list[Tensor]:
            model = stack(recompute)
            first, second = torch.linspace(-1, 1, 64).view(2, 32), torch.linspace(0, 2, 96).view(3, 32)
            (model(first).square().sum() + model(second).square().sum()).backward()
            return [p.grad for p in model.parameters() if p.grad is not None]

        for one, other in zip(gradients("inputs"), gradients("none"), strict=True):
            assert torch.equal(one, other)


class TestBytes:
    # In units of rows x width x 4 bytes a block keeps with `none`: both norms' inputs (2), both norms' outputs (2),
    # the activation's input and output (4 + 4). With `inputs` the outputs go: 6 are left. Norms keep two numbers a
    # row besides, and each update a threshold.
    unit = 50 * 32 * 4
    small = 2 * 2 * 50 * 4 + 5 * 4

    @pytest.mark.parametrize(("recompute", "units"), [("none", 12), ("inputs", 6)])
    def test_what_a_block_keeps(self, recompute: str, units: int) -> None:
        model = stack(recompute)
        first = self.unit  # the input of the trainable first layer

        kept = kept_bytes(model, lambda: model(torch.randn(50, 32)))

        assert kept == first + 3 * (units * self.unit + self.small)

    def test_with_blocks_all_but_the_last_keep_their_input_alone(self) -> None:
        model = stack("blocks")

        kept = kept_bytes(model, lambda: model(torch.randn(50, 32)))

        # Inputs of the first layer and of two blocks; the last block keeps what `inputs` keeps. What a checkpoint
        # notes of the random state is no tensor that autograd keeps.
        assert kept == 3 * self.unit + 6 * self.unit + self.small

    @pytest.mark.parametrize("recompute", ["none", "inputs"])
    def test_under_autocast_q_k_and_v_keep_one_low_precision_input(self, recompute: str) -> None:
        class Projections(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList([nn.ModuleDict({name: nn.Linear(32, 32) for name in "qkv"})])

            def forward(self, x: Tensor) -> Tensor:
                return sum(layer(x) for layer in self.blocks[0].values())

        model = Projections()
        inject(model, large_config(recompute=recompute, train_also=[]))
        x = torch.randn(50, 32)

        def run() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        assert kept_bytes(model, run) == 50 * 32 * 2 + 3 * 4

    def test_a_convolution_keeps_its_input_as_it_came_and_once(self) -> None:
        layer = SnellLinear(nn.Conv2d(8, 6, 1), SnellConfig(rank=4, recompute="none")).train()
        image = torch.randn(2, 8, 5, 5)
        kept = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(image).sum().backward()

        assert image.untyped_storage().data_ptr() in kept


class TestBlocks:
    def test_each_but_the_last_runs_twice_in_training_and_once_in_evaluation(self) -> None:
        model = stack("blocks")

        model(torch.randn(4, 32)).sum().backward()
        # The first step tries besides whether a block gives the same again.
        assert [block.calls for block in model.blocks] == [3, 3, 1]

        model(torch.randn(4, 32)).sum().backward()
        assert [block.calls for block in model.blocks] == [5, 5, 2]

        with torch.no_grad():
            model.eval()(torch.randn(4, 32))
        assert [block.calls for block in model.blocks] == [6, 6, 3]

    def test_are_the_innermost_numbered_modules_with_several_layers(self) -> None:
        layers = [
            "layers.0.blocks.1.attn.qkv",
            "layers.0.blocks.1.mlp.0",
            "layers.0.blocks.1.mlp.2",
            "layers.0.blocks.0.attn.qkv",
            "layers.0.blocks.0.mlp.0",
            "layers.1.proj",
            "10.fc1",
            "10.fc2",
            "head",
        ]

        expected = ["layers.0.blocks.1", "layers.0.blocks.0", "layers.1", "10"]
        assert blocks_of(module_of(layers), layers) == expected

    def test_may_have_a_number_at_the_end_of_their_name(self) -> None:
        layers = [
            f"features.layer{stage}.block_{block}.{layer}"
            for stage in (1, 2)
            for block in (0, 1)
            for layer in ("mlp1.fc", "mlp2.fc")
        ]

        expected = [f"features.layer{stage}.block_{block}" for stage in (1, 2) for block in (0, 1)]
        assert blocks_of(module_of(layers), layers) == expected

    @pytest.mark.parametrize("model", [nn.Sequential(Block(8)), nn.ModuleDict({"only": Block(8)})], ids=["one", "none"])
    def test_that_are_too_few_to_run_again_are_told(self, model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
        inject(model, SnellConfig(rank=2, recompute="blocks", targets=["fc1"]))

        assert "recompute is 'blocks', but" in caplog.text
        assert "acts as 'inputs'" in caplog.text

    def test_keep_their_class_names_and_parameters_names(self) -> None:
        model, plain = stack("blocks"), stack("none")

        assert isinstance(model.blocks[0], Block)
        assert list(model.state_dict()) == list(plain.state_dict())

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    def test_a_copy_recomputes_too_and_is_independent(self, copied: Callable[[nn.Module], nn.Module]) -> None:
        model = stack("blocks")

        other = copied(model)
        other(torch.randn(4, 32)).sum().backward()

        assert [block.calls for block in other.blocks] == [3, 3, 1]
        assert [block.calls for block in model.blocks] == [0, 0, 0]
        assert all(p.grad is None for p in model.parameters())


class TestMerging:
    @pytest.mark.parametrize("recompute", ["none", "inputs", "blocks"])
    def test_leaves_a_plain_model(self, recompute: str) -> None:
        model = stack(recompute)

        merge(model)

        assert all(type(block) is Block for block in model.blocks)
        assert not any(module._forward_hooks for module in model.modules())


def test_an_unknown_value_is_refused_by_name() -> None:
    with pytest.raises(
        UserError, match="recompute must be one of none, inputs, blocks, not 'input'; did you mean inputs"
    ):
        SnellConfig(recompute="input")
