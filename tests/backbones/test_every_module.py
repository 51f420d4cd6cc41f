"""Issue row C1 to C6 on a small model of each of timm's modules: what docs/backbones.md says of it holds.

The rows of q, k and v are found a second time in another way: with real numbers, as the outputs of a layer on which an
operand of the model's own attention has a gradient.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.backbones import Row, describe, read_table
from snell_lightning.adapters import (
    SnellConfig,
    SnellDelta,
    SnellLinear,
    adapter_parameters,
    adapter_state_dict,
    heads,
    inject,
    load_adapter_state_dict,
    merge,
)
from snell_lightning.adapters.finding import blocks_of
from snell_lightning.adapters.layers.recompute import RECOMPUTE, keep_everything, rebuild_inputs, recompute_blocks

ROWS = read_table()
REFUSED = [row for row in ROWS if row.layers.startswith("refused")]
pytestmark = pytest.mark.backbones


def lively(model: nn.Module, images: Tensor) -> nn.Module:
    """Scales and heads that start at nothing are drawn anew, so that each layer reaches the logits."""
    ends = {f"{name}.weight" for name in heads(model)}
    for name, parameter in model.named_parameters():
        if name in ends:
            nn.init.normal_(parameter, std=0.1)
        elif (
            parameter.numel() == max(parameter.shape, default=1) and "bias" not in name and parameter.abs().max() < 1e-2
        ):
            nn.init.uniform_(parameter, 0.2, 1.0)
    # Batch norms that have never seen an image let deep networks die out.
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def logits(model: nn.Module, images: Tensor) -> Tensor:
    output = model(images)
    return sum(output) if isinstance(output, (tuple, list)) else output


def gradients(model: nn.Module, images: Tensor, keep: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(3)
    # Not a cross-entropy: logits of random weights may be large, and that has no gradient then.
    (logits(model, images) * torch.tensor([[1.0, -2.0, 0.5], [-1.0, 0.5, 2.0]])).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    if not keep:
        model.zero_grad()
    return found


def recompute(model: nn.Module, names: list[str], setting: str) -> None:
    """Change the setting of an adapted model."""
    keep_everything(model)
    for name in names:
        model.get_submodule(name).config.recompute = setting
    if setting != "none":
        rebuild_inputs(model)
    if setting == "blocks":
        recompute_blocks(model, blocks_of(model, names))


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


class Operands(TorchFunctionMode):
    """Notes the operands of products of activations, as a plain model computes with them.

    Attributes:
        seen: Each with its place among those of torch's own attention, of which the third are averaged; None of others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int | None, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        tensors = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Tensor)]
        if func is F.scaled_dot_product_attention:
            self.seen += enumerate(tensors[:3])
        elif getattr(func, "__name__", "") in ("matmul", "__matmul__", "bmm"):
            self.seen += [(None, tensor) for tensor in tensors]
        return func(*args, **(kwargs or {}))


@contextmanager
def leaves(layers: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """The outputs of these layers, each call's as a leaf of its own."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            found[name].append(leaf)
            # Not the leaf itself, which could not be changed in place.
            return leaf * 1.0

        return hook

    handles = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


Places = dict[frozenset[int], set[int | None]]


def rows_of_operands(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Places]:
    """For each layer the rows that single operands of attention depend on, with the places of these operands."""
    layers = {name: model.get_submodule(name) for name in names}
    found: dict[str, Places] = {name: {} for name in names}
    with leaves(layers) as outputs, Operands() as operands:
        logits(model, images)
    all_leaves = [(name, leaf) for name, several in outputs.items() for leaf in several]
    for place, operand in operands.seen:
        if not operand.requires_grad:
            continue
        weights = torch.randn(operand.shape, generator=torch.Generator().manual_seed(0))
        ends = [leaf for _, leaf in all_leaves]
        grads = torch.autograd.grad((operand * weights).sum(), ends, retain_graph=True, allow_unused=True)
        for (name, _), grad in zip(all_leaves, grads, strict=True):
            if grad is not None:
                dim = 1 if isinstance(layers[name], nn.Conv2d) else grad.ndim - 1
                touched = grad.abs().movedim(dim, 0).flatten(1).sum(1)
                rows = frozenset(touched.nonzero().flatten().tolist())
                if rows:
                    found[name].setdefault(rows, set()).add(place)
    return found


def smallest(parts: Iterable[frozenset[int]]) -> list[frozenset[int]]:
    return [part for part in parts if not any(other < part for other in parts)]


def rows_of_updates(layer: SnellLinear) -> list[frozenset[int]]:
    """The rows that each update changes."""
    order = layer._buffers["_order"]
    order = torch.arange(layer.out_features) if order is None else order
    return [frozenset(rows.tolist()) for rows in order.split([delta.out_features for delta in layer.updates])]


@pytest.mark.parametrize("row", [row for row in ROWS if row not in REFUSED], ids=lambda row: row.module)
def test_holds_what_the_table_says(row: Row, caplog: pytest.LogCaptureFixture) -> None:
    images = torch.randn(2, 3, int(row.pixels), int(row.pixels), generator=torch.Generator().manual_seed(1))
    model = lively(row.create(), images)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        expected = logits(plain, images)
    assert expected.isfinite().all()
    assert expected.any()

    # A vanishing update leaves the output as it is.
    names = inject(model, SnellConfig(rank=2, sparsity=0.5, sparsifier="hard", scale=1e-12))
    assert row.described(model, names) == row
    assert "competes as one" not in caplog.text
    with torch.no_grad():
        assert close(logits(model, images), expected, 1e-3)

    # Each update's rows are those of one operand, where the model's attention has operands.
    operands = rows_of_operands(plain, names, images)
    for name in names:
        layer = model.get_submodule(name)
        updates = rows_of_updates(layer)
        assert sum(map(len, updates)) == layer.out_features
        for part in smallest(operands[name]) if layer.in_features > 1 else ():
            assert part in updates, f"{name}: rows {sorted(part)[:8]}... are one operand and no update"
            # Of several operands are the rows of a layer before one that is not called.
            if None not in (places := operands[name][part]) and len(places) == 1:
                averaged = layer.deltas[updates.index(part)].of_values
                assert averaged == (places == {2}), f"{name}: rows {sorted(part)[:8]}... are operand {places}"

    # Large updates: the same gradients whatever is recomputed, and each of them reaches its adapter.
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, SnellDelta):
            nn.init.normal_(module.in_factors)
            nn.init.normal_(module.out_factors)
    for name in names:
        layer = model.get_submodule(name)
        for delta in layer.deltas:
            delta.scale = 0.2 * layer.weight.std().item() if layer.weight.numel() > 1 else 0.1
    model.train()
    found = {}
    for setting in RECOMPUTE:
        recompute(model, names, setting)
        found[setting] = gradients(model, images)
    factors, silent = {name for name, _ in adapter_parameters(model)}, {}
    for name, gradient in found["none"].items():
        assert gradient.isfinite().all(), name
        if name in factors and not gradient.any():
            layer, _, update = name.rpartition(".")[0].partition(".deltas.")
            silent[layer, int(update)] = sorted(rows_of_updates(model.get_submodule(layer))[int(update)])
        for setting in RECOMPUTE:
            assert torch.equal(found[setting][name], gradient), f"{name} with recompute {setting}"
    # All that is trained has a part in every step, which is what DDP counts on. ConViT's token comes in at the eleventh
    # block, which this small one has not.
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained - found["none"].keys() == ({"cls_token"} if row.module == "convit" else set())
    assert len(silent) <= len(names) / 2

    # An adapter without a gradient belongs to rows that have none: behind a gate that is shut, a norm of one feature.
    if silent:
        shut = merge(copy.deepcopy(model)).eval()
        for layer, _ in silent:
            shut.get_submodule(layer).weight.requires_grad_()
        through = gradients(shut, images)
        # To rounding, which differs between processors.
        largest = max(float(gradient.abs().max()) for gradient in through.values())
        for (layer, _), rows in silent.items():
            assert float(through[f"{layer}.weight"][rows].abs().max()) <= 1e-6 * largest, layer

    # Two steps change every adapter that has a gradient.
    before = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        assert all(gradient.isfinite().all() for gradient in gradients(model, images, keep=True).values())
        optimizer.step()
        model.zero_grad()
    for name, parameter in adapter_parameters(model):
        assert parameter.isfinite().all(), name
        assert found["none"][name].eq(0).all() or not torch.equal(parameter, before[name]), name

    # What is saved makes the same logits again, and so does the plain model with the updates in its weights.
    model.eval()
    with torch.no_grad():
        tuned = logits(model, images)
        assert not close(tuned, expected, 2e-3)
        state = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
        for tensor in adapter_state_dict(model).values():
            tensor.zero_()
        load_adapter_state_dict(model, state)
        assert torch.equal(logits(model, images), tuned)
        merge(model)
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert close(logits(model, images), tuned, 5e-4)


@pytest.mark.parametrize(
    ("name", "arguments", "layers"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "depths": (1, 2)},
            ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        ),
        (
            "swinv2_tiny_window8_256",
            {"img_size": 64, "depths": (1, 2)},
            ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        ),
        ("convnext_atto", {"depths": (1, 2, 1, 1)}, ("mlp.fc1", "mlp.fc2")),
        ("convnextv2_atto", {"depths": (1, 2, 1, 1)}, ("mlp.fc1", "mlp.fc2")),
    ],
)
def test_swin_and_convnext_in_the_published_setting(name: str, arguments: Any, layers: tuple[str, ...]) -> None:
    model = timm.create_model(name, num_classes=3, **arguments)

    names = inject(model, SnellConfig(rank=2))

    # Every linear layer of each block; q, k and v apart.
    stages = "layers" if "swin" in name else "stages"
    blocks = [
        f"{stages}.{stage}.blocks.{block}" for stage, depth in enumerate(arguments["depths"]) for block in range(depth)
    ]
    assert names == [f"{block}.{layer}" for block in blocks for layer in layers]
    for each in names:
        assert len(model.get_submodule(each).deltas) == (3 if each.endswith("qkv") else 1)
    trained = {
        name for name, parameter in model.named_parameters() if parameter.requires_grad and ".deltas." not in name
    }
    assert trained == {"head.fc.weight", "head.fc.bias"}


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.module)
def test_is_refused_with_the_reason_in_the_table(row: Row) -> None:
    assert describe(row) == row


def test_the_table_has_all_modules_of_the_timm_it_names() -> None:
    assert len(ROWS) == len({row.module for row in ROWS}) == 98
    if timm.__version__ == "1.0.31":
        # Without those that others have registered, as the embedded backbone is.
        own = {module for module in timm.list_modules() if find_spec(f"timm.models.{module}")}
        assert {row.module for row in ROWS} == own
