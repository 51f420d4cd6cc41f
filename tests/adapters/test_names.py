"""Files do not depend on what a model was wrapped in while it was trained."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from snell_lightning.adapters import (
    SnellConfig,
    adapter_state_dict,
    deltas,
    fingerprint,
    inject,
    load_adapter,
    load_adapter_state_dict,
    merge,
    save_adapter,
)
from snell_lightning.adapters.names import plain_name, unwrapped

from .models import enlarge, large_config, make_images, make_model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def inner(model: nn.Module) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


class Parallel(nn.parallel.DistributedDataParallel):
    """As far as names go."""

    def __init__(self, model: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = model

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.module(*arguments)


WRAPPERS = {
    "compiled": compiled,
    "a block compiled": inner,
    "parallel": Parallel,
    "data parallel": nn.DataParallel,
    "both": lambda model: Parallel(compiled(model)),
    "both, the other way": lambda model: compiled(Parallel(model)),
}
wrapped = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def tuned() -> nn.Module:
    model = make_model("vit")
    inject(model, large_config())
    return enlarge(model).eval()


@wrapped
def test_names_are_those_of_the_plain_model(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = tuned()
    names, updates, frozen = list(adapter_state_dict(model)), list(deltas(model)), fingerprint(model)
    model = wrap(model)
    assert list(adapter_state_dict(model)) == names
    assert list(deltas(model)) == updates
    assert fingerprint(model) == frozen


@wrapped
@pytest.mark.parametrize("back", [False, True])
def test_a_file_fits_a_plain_model_and_a_wrapped_one(
    wrap: Callable[[nn.Module], nn.Module], back: bool, tmp_path: Path
) -> None:
    source, target = tuned(), make_model("vit")
    images = make_images("vit")
    with torch.no_grad():
        expected = source(images)
    source, target = (source, wrap(target)) if back else (wrap(source), target)
    save_adapter(tmp_path / "a.safetensors", source, large_config(), "vit")
    load_adapter(tmp_path / "a.safetensors", target)
    with torch.no_grad():
        assert torch.equal(unwrapped(target).eval()(images), expected)


@wrapped
def test_a_wrapped_model_can_be_adapted_and_merged(wrap: Callable[[nn.Module], nn.Module]) -> None:
    expected = make_model("vit")
    inject(expected, SnellConfig(rank=2, rank_pattern={r"blocks\.1\.attn": 4}, targets=[r"blocks\.\d\.attn\.qkv"]))
    model = wrap(make_model("vit"))
    inject(model, SnellConfig(rank=2, rank_pattern={r"blocks\.1\.attn": 4}, targets=[r"blocks\.\d\.attn\.qkv"]))
    assert {name: tensor.shape for name, tensor in adapter_state_dict(model).items()} == {
        name: tensor.shape for name, tensor in adapter_state_dict(expected).items()
    }
    plain = make_model("vit").state_dict()
    assert {plain_name(name) for name in unwrapped(merge(model)).state_dict()} == plain.keys()


def test_a_state_saved_with_wrapped_names_is_taken() -> None:
    state = {f"_orig_mod.{name}": tensor + 1 for name, tensor in adapter_state_dict(tuned()).items()}
    model = tuned()
    load_adapter_state_dict(model, state)
    assert all(torch.equal(tensor, state[f"_orig_mod.{name}"]) for name, tensor in adapter_state_dict(model).items())
