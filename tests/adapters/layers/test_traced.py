"""Models that `torch.compile` traces: one graph, the same numbers, and nothing kept that is not kept otherwise."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from snell_lightning.adapters import SnellConfig, SnellLinear, inject
from tests.adapters.models import enlarge, large_config, make_images, make_model
from tests.adapters.reference import relative_error


@pytest.fixture(autouse=True)
def _from_the_start() -> None:
    torch._dynamo.reset()


def tuned(family: str = "deit-distilled", **settings: object) -> nn.Module:
    model = make_model(family)
    inject(model, large_config(**settings))
    return enlarge(model).train()


def loss(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return sum(each.square().sum() for each in (output if isinstance(output, tuple) else (output,)))


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["deit-distilled", "convnext"])
def test_a_tuned_model_is_one_graph_with_the_same_numbers(family: str, precision: torch.dtype) -> None:
    model, twin, images = tuned(family), tuned(family), make_images(family)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, backend=backend, fullgraph=True)

    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        expected, found = loss(model(images)), loss(compiled(images))
    expected.backward()
    found.backward()

    assert backend.frame_count == 1
    (graph,) = backend.graphs
    layers = [module for module in model.modules() if isinstance(module, SnellLinear)]
    assert sum("snell.tuned" in str(node.target) for node in graph.graph.nodes) == len(layers)
    tolerance = 1e-5 if precision == torch.float32 else 2e-2
    assert relative_error(found, expected) < tolerance
    for one, other in zip(gradients(twin), gradients(model), strict=True):
        assert relative_error(one, other) < tolerance


def test_no_graph_breaks() -> None:
    explained = torch._dynamo.explain(tuned())(make_images("deit-distilled"))

    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


def test_blocks_that_run_again_are_in_the_graph() -> None:
    model, twin, images = tuned(recompute="blocks"), tuned(recompute="blocks"), make_images("deit-distilled")
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)

    loss(model(images)).backward()
    loss(compiled(images)).backward()

    for one, other in zip(gradients(twin), gradients(model), strict=True):
        assert relative_error(one, other) < 1e-5


def test_evaluation_is_traced_too() -> None:
    model, images = tuned().eval(), make_images("deit-distilled")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    with torch.no_grad():
        found, expected = compiled(images), model(images)

    for one, other in zip(*((each if isinstance(each, tuple) else (each,)) for each in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_dropped_entries_and_samples_are_others_each_time_and_the_same_in_backward() -> None:
    torch.manual_seed(0)
    layer = SnellLinear(nn.Linear(16, 16), large_config(dropout=0.3, drop_path=0.3))
    enlarge(layer)
    nn.init.zeros_(layer._parameters["weight"])
    nn.init.zeros_(layer._parameters["bias"])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(40, 3, 16, requires_grad=True)

    first, second = compiled(x), compiled(x)
    lost = first.abs().sum((1, 2)) == 0
    first.square().sum().backward()

    assert not torch.equal(first, second)
    assert 2 < lost.sum() < 25
    # Without a frozen weight a lost sample's input has no gradient, a dropped entry has none either.
    assert (x.grad[lost] == 0).all()
    assert 0.2 < (x.grad[~lost] == 0).float().mean() < 0.4


def test_a_change_of_sparsity_is_followed() -> None:
    model, images = tuned(), make_images("deit-distilled")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = loss(compiled(images))

    for module in model.modules():
        if isinstance(module, SnellLinear):
            for delta in module.updates:
                delta.sparsity = 0.9

    torch.testing.assert_close(loss(compiled(images)), loss(model(images)))
    assert loss(model(images)) != before


def test_frozen_weights_in_training_keep_what_is_kept_otherwise() -> None:
    layer = enlarge(SnellLinear(nn.Linear(256, 512), SnellConfig(rank=4)))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    saved: list[Tensor] = []
    x = torch.randn(3, 256, requires_grad=True)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        compiled(x)

    own = {parameter.data_ptr() for parameter in layer.parameters()}
    assert all(tensor.numel() <= x.numel() for tensor in saved if tensor.data_ptr() not in own)
    assert saved
