"""Tuned layers and models with the GPU's programs, run by Triton's interpreter, against the same without them."""

import copy
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from snell_lightning.adapters import SnellConfig, SnellLinear, inject
from snell_lightning.adapters.layers import traced
from snell_lightning.adapters.update import shared, triton
from snell_lightning.adapters.update.noise import Noise
from tests.adapters.reference import relative_error

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the CPU for a device that programs are written for."""
    triton.usable.cache_clear()
    monkeypatch.setattr(triton, "DEVICES", frozenset({"cpu"}))
    assert triton.usable(torch.device("cpu"))
    yield
    triton.usable.cache_clear()


class Calls(TorchDispatchMode):
    """Counts the calls of this package's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "snell":
            self.of[func._opname] = self.of.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


class NoReads(TorchDispatchMode):
    """Fails on operations whose outcome the host waits for. Numbers of the CPU's generator are the host's own."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[-1]
        waits = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "_to_cpu", "index")
        assert name not in waits, f"{name} on the accelerator's path"
        return func(*args, **(kwargs or {}))


def layer(slices: object = 1, **settings: object) -> SnellLinear:
    torch.manual_seed(0)
    config = SnellConfig(**{"rank": 4, "sparsity": 0.8, "start": "random", "scale": 0.5, **settings})
    return SnellLinear(nn.Linear(20, 36), config, slices=slices)


def step(layer: SnellLinear, x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.deltas.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("slices", "settings"),
    [
        (1, {}),
        (3, {}),
        (3, {"sparsity": 0.0}),
        ([range(0, 36, 2), range(1, 36, 2)], {}),
        (1, {"sparsifier": "magnitude", "pieces": 1}),
        (2, {"kernel": "linear"}),
        (1, {"dropout": 0.2}),
        (2, {"drop_path": 0.5}),
    ],
)
def test_a_layer_gives_what_it_gives_without_them(
    request: pytest.FixtureRequest, slices: object, settings: dict, dtype: torch.dtype
) -> None:
    one, other = layer(slices, **settings), layer(slices, **settings)
    x = torch.randn(6, 3, 20).to(dtype)

    expected = step(one, x)
    request.getfixturevalue("programs")
    # The same numbers on both sides.
    request.getfixturevalue("monkeypatch").setattr(Noise, "_by_program", lambda *_: False)
    with Calls() as calls:
        found = step(other, x)

    # What is made in bf16 here, the update, is made in fp32 and then rounded there.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours.float(), theirs.float()) < tolerance
    dense = settings.get("sparsity") == 0.0
    assert calls.of == {"write_all": 1, "backward_all": 1} | ({} if dense else {"thresholds": 1})


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_gives_what_training_gives(dtype: torch.dtype) -> None:
    tuned = layer(3)
    x = torch.randn(5, 20).to(dtype)

    trained = tuned(x)
    tuned.eval()
    with torch.no_grad():
        evaluated = tuned(x)

    assert torch.equal(evaluated, trained)


def tiny(depth: int = 1, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": depth, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    inject(model, SnellConfig(rank=4, sparsity=0.8, **settings))
    return model.train()


def loss(model: nn.Module) -> Tensor:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return model(images).square().sum()


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("settings", [{"dropout": 0.3}, {"drop_path": 0.3}, {"dropout": 0.3, "drop_path": 0.3}])
def test_noise_is_one_program_with_the_same_mask_in_backward(settings: dict[str, float]) -> None:
    tuned = layer(**settings)
    nn.init.zeros_(tuned._parameters["weight"])
    nn.init.zeros_(tuned._parameters["bias"])
    x = torch.randn(200, 2, 20, requires_grad=True)

    with Calls() as calls:
        y = tuned(x)
        y.square().sum().backward()

    assert calls.of["dropped"] == 2
    lost = (y == 0).all(2).all(1)
    assert (x.grad[lost] == 0).all()
    assert lost.float().mean().item() == pytest.approx(settings.get("drop_path", 0.0), abs=0.12)
    entries = (x.grad[~lost] == 0).float().mean().item()
    assert entries == pytest.approx(settings.get("dropout", 0.0), abs=0.05)


@pytest.mark.usefixtures("programs")
def test_thresholds_of_a_model_are_found_once_a_step() -> None:
    model = tiny()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(model)

    def found() -> int:
        with Calls() as calls:
            loss(model).backward()
        return calls.of.get("thresholds", 0)

    assert found() == 0  # As in an accumulation.
    optimizer.step()
    assert found() == 1
    assert found() == 0
    model.eval()
    assert found() == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert found() == 1


@pytest.mark.usefixtures("programs")
def test_thresholds_follow_every_way_of_changing_a_factor() -> None:
    model = tiny()
    tuned = next(module for module in model.modules() if isinstance(module, SnellLinear))
    delta = tuned.updates[0]

    def right() -> bool:
        loss(model)
        known = tuned.thresholds.of(tuned)
        assert known is not None
        matrix = torch.empty(delta.out_features, delta.in_features)
        operands = [delta.out_factors.detach()], [delta.in_factors.detach()], "distance", "none", [delta.scale]
        torch.ops.snell.write_all(*operands, None, matrix, None, None, 1.0)
        rank = delta.rule.rank(delta.out_factors, delta.in_factors)
        return bool(known[0] == matrix.abs().flatten().kthvalue(rank).values)

    with torch.no_grad():
        delta.in_factors.add_(torch.randn_like(delta.in_factors))
    assert right()
    delta.out_factors.data = torch.randn_like(delta.out_factors)
    assert right()
    delta.sparsity = 0.5
    assert right()
    optimizer = torch.optim.AdamW([delta.in_factors], lr=0.1)
    loss(model).backward()
    optimizer.step()
    assert right()
    delta.in_factors.data.add_(torch.randn_like(delta.in_factors))  # No version counts this: see `SharedThresholds`.
    model.eval()
    assert right()
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})
    assert right()


@pytest.mark.usefixtures("programs")
def test_a_copy_of_a_model_has_thresholds_of_its_own() -> None:
    model = tiny()
    expected = loss(model)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.5)
    loss(twin).backward()
    optimizer.step()
    with Calls() as calls:
        moved = loss(twin)

    assert calls.of["thresholds"] == 1
    assert torch.equal(loss(model), expected)
    assert not torch.equal(moved, expected)


@pytest.mark.usefixtures("programs")
def test_what_evaluation_found_can_be_trained_with() -> None:
    model = tiny()
    with torch.inference_mode():
        loss(model)

    loss(model).backward()


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"dropout": 0.1, "drop_path": 0.1}),
        (torch.bfloat16, {"recompute": "blocks"}),
    ],
)
def test_no_step_waits_for_a_value(
    monkeypatch: pytest.MonkeyPatch, precision: torch.dtype, settings: dict[str, object]
) -> None:
    model = tiny(2 if settings.get("recompute") == "blocks" else 1, **settings)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    # Drawn by the host, from the CPU's generator.
    monkeypatch.setattr(Noise, "draw", lambda dropout, drop_path: Noise(dropout, drop_path, 2**40))

    def step() -> None:
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            total = loss(model)
        total.backward()
        optimizer.step()

    step()  # Whether modules repeat themselves is found out at first.
    with NoReads():
        step()


@pytest.mark.usefixtures("programs")
def test_a_read_would_be_noticed() -> None:
    with NoReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(()).item()


@pytest.mark.usefixtures("programs")
def test_a_compiled_model_shares_thresholds_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = tiny(drop_path=0.2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss(compiled).backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()
    calls = Calls()
    for name in ("forward", "backward"):
        original = getattr(traced, name)

        def watched(*args: object, original: Callable = original) -> object:
            with NoReads(), calls:
                return original(*args)

        monkeypatch.setattr(traced, name, watched)
    updates: list[int] = []
    find = shared.thresholds
    monkeypatch.setattr(shared, "thresholds", lambda rules, factors: updates.append(len(rules)) or find(rules, factors))

    loss(compiled).backward()

    assert updates == [6]  # Of q, k, v, proj, fc1 and fc2 at once.
    assert calls.of == {"write_all": 4, "backward_all": 4, "dropped": 8}


def test_torchs_operations_do_it_where_triton_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    triton.usable.cache_clear()
    monkeypatch.setattr(triton, "DEVICES", frozenset({"cpu"}))
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    said: list[str] = []
    monkeypatch.setattr(triton._log, "warning", lambda message, *values: said.append(message % values))

    with Calls() as calls:
        step(layer(), torch.randn(4, 20))
        step(layer(), torch.randn(4, 20))
    triton.usable.cache_clear()

    assert not {"write_all", "backward_all", "thresholds"} & set(calls.of)
    assert said == ["the update is made by torch's operations on cpu, which is slower: triton is not installed"]
