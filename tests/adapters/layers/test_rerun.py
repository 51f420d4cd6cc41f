"""Blocks and inputs that are made again: what would not come out the same is found, or never made again."""

import random

import pytest
import timm
import torch
from torch import Tensor, nn

from snell_lightning.adapters import SnellConfig, SnellLinear, UserError, deltas, inject
from tests.adapters.models import enlarge, large_config


class Block(nn.Module):
    """Two layers; the other ways of being called are below."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(width, width), nn.Linear(width, width), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class Branches(Block):
    """Puts its outputs into the list that it is given, as HRNet's modules do."""

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        for i, layer in enumerate((self.fc1, self.fc2)):
            xs[i] = self.act(layer(xs[i]))
        return [xs[0] + xs[1], xs[1]]


class Noted(Block):
    """Leaves something in a dictionary, for the caller to read."""

    def forward(self, x: Tensor, notes: dict[str, Tensor]) -> Tensor:
        notes["before"] = notes["now"]
        notes["now"] = super().forward(x) + notes["before"]
        return notes["now"]


class Counting(Block):
    """Keeps a state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) * self.count


class Chancy(Block):
    """Draws from a generator that torch does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * random.random()


class Dropping(Block):
    """Draws from torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Overwriting(Block):
    """Changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2.0))


def adapted(blocks: list[nn.Module], recompute: str = "blocks") -> nn.ModuleList:
    torch.manual_seed(0)
    model = nn.ModuleList(blocks)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    inject(model, large_config(rank=2, recompute=recompute))
    return enlarge(model).train()


def gradients(model: nn.Module, output: Tensor) -> list[Tensor]:
    output.square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    assert len(found) == len(expected) > 0
    assert all(gradient.any() for gradient in expected)
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class TestC2BlocksThatChangeTheirArguments:
    """Issue row C2: containers are copied, and a block that gives another output is an error that names it."""

    def test_a_list_is_given_again_as_it_was(self) -> None:
        def run(recompute: str) -> list[Tensor]:
            model = adapted([Branches(), Branches(), Branches()], recompute)
            xs = [torch.linspace(-1, 1, 16).view(2, 8), torch.linspace(0, 2, 16).view(2, 8)]
            for block in model:
                xs = block(xs)
            return gradients(model, xs[0] + xs[1])

        assert equal(run("blocks"), run("none"))

    def test_hrnet_has_the_gradients_of_keeping_everything(self) -> None:
        def run(recompute: str) -> list[Tensor]:
            torch.manual_seed(0)
            model = timm.create_model("hrnet_w18_small", num_classes=3)
            inject(model, large_config(rank=2, recompute=recompute))
            torch.manual_seed(1)
            enlarge(model, lambda factors: nn.init.normal_(factors, std=0.1)).eval()
            images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
            return gradients(model, model(images))

        found, expected = run("blocks"), run("none")
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert len(found) >= 2 * 20

    def test_what_a_block_leaves_in_a_dictionary_is_there_for_the_caller(self) -> None:
        def run(recompute: str) -> tuple[list[Tensor], dict[str, Tensor]]:
            model = adapted([Noted(), Noted(), Noted()], recompute)
            x = torch.linspace(-1, 1, 16).view(2, 8)
            notes = {"now": x}
            for block in model:
                x = block(x, notes=notes)
            return gradients(model, x + notes["before"]), notes

        (found, one), (expected, other) = run("blocks"), run("none")
        assert equal(found, expected)
        assert one.keys() == other.keys() == {"now", "before"}
        assert torch.equal(one["before"], other["before"])

    @pytest.mark.parametrize("kind", [Counting, Chancy, Overwriting])
    def test_another_output_is_an_error_that_names_the_block(self, kind: type[Block]) -> None:
        model = adapted([Block(), kind(), Block()])
        x = model[0](torch.randn(2, 8))
        with pytest.raises(UserError, match=rf"'blocks', and 1 \({kind.__name__}\) cannot be run again.*'inputs'"):
            model[1](x)

    def test_torchs_own_randomness_comes_again_and_is_left_as_it_was(self) -> None:
        def run(recompute: str) -> tuple[list[Tensor], Tensor]:
            model = adapted([Dropping(), Dropping(), Dropping()], recompute)
            torch.manual_seed(5)
            x = torch.linspace(-1, 1, 16).view(2, 8)
            for block in model:
                x = block(x)
            after = torch.rand(3)
            return gradients(model, x), after

        (found, one), (expected, other) = run("blocks"), run("none")
        assert equal(found, expected)
        assert torch.equal(one, other)

    def test_is_tried_once(self) -> None:
        model = adapted([Block(), Block()])
        calls = []
        model[0].fc1.register_forward_hook(lambda *_: calls.append(1))
        for _ in range(3):
            model[0](torch.randn(2, 8))
        assert len(calls) == 4


class TestC7SettingsOfForward:
    """Issue row C7: what held in forward holds in the run in backward."""

    @staticmethod
    def run(recompute: str, change: bool) -> tuple[list[Tensor], nn.Module]:
        model = adapted([Dropping(), Dropping(), Block()], recompute)
        torch.manual_seed(5)
        x = torch.linspace(-1, 1, 16).view(2, 8)
        for block in model:
            x = block(x)
        if change:
            for delta in deltas(model).values():
                delta.sparsity = 0.1
            model.eval()
        return gradients(model, x), model

    @pytest.mark.parametrize("recompute", ["none", "inputs", "blocks"])
    def test_sparsity_and_mode_may_be_changed_in_between(self, recompute: str) -> None:
        expected, _ = self.run("none", change=False)
        found, model = self.run(recompute, change=True)
        assert equal(found, expected)
        assert {delta.sparsity for delta in deltas(model).values()} == {0.1}
        assert not any(module.training for module in model.modules())

    def test_a_step_in_between_is_an_error(self) -> None:
        model = adapted([Block(), Block()])
        output = model[1](model[0](torch.randn(2, 8)))
        with torch.no_grad():
            model[0].fc1.deltas[0].in_factors.mul_(2.0)
        with pytest.raises(UserError, match="a trained tensor of 0 was changed between forward and backward"):
            output.sum().backward()


class NoisyGELU(nn.GELU):
    """By name a module whose output can be made again."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(x.shape)


class EagerGELU(nn.GELU):
    """Changes its input on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2.0))


class TestInputs:
    @pytest.mark.parametrize("kind", [NoisyGELU, EagerGELU])
    def test_that_would_come_out_otherwise_are_kept(self, kind: type[nn.Module]) -> None:
        def run(recompute: str) -> list[Tensor]:
            torch.manual_seed(0)
            model = nn.ModuleDict({"act": kind(), "fc": nn.Linear(8, 8)})
            inject(model, SnellConfig(rank=2, scale=1.0, recompute=recompute, targets=["fc"]))
            enlarge(model)
            torch.manual_seed(1)
            return gradients(model, model["fc"](model["act"](torch.randn(4, 8) * 1.0)))

        assert equal(run("inputs"), run("none"))

    def test_behind_a_hook_that_changes_them_are_kept(self) -> None:
        def run(recompute: str) -> list[Tensor]:
            torch.manual_seed(0)
            model = nn.ModuleDict({"act": nn.GELU(), "fc": nn.Linear(8, 8)})
            model["act"].register_forward_hook(lambda module, arguments, output: output + 1)
            inject(model, SnellConfig(rank=2, scale=1.0, recompute=recompute, targets=["fc"]))
            enlarge(model)
            assert isinstance(model["fc"], SnellLinear)
            return gradients(model, model["fc"](model["act"](torch.linspace(-1, 1, 32).view(4, 8))))

        assert equal(run("inputs"), run("none"))
