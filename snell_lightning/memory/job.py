"""A training run as far as its memory goes, and its model: built by the code that a run uses."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from snell_lightning.adapters import SnellConfig, SnellLinear, UserError, cast_frozen, freeze_all_but_head, inject
from snell_lightning.adapters.guards import unguard
from snell_lightning.adapters.layers.recompute import RECOMPUTE
from snell_lightning.backbones.sizes import ImageSize

Method = Literal["snell", "full", "linear", "lora"]
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
WHOLE = {"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
# Lightning's short names.
_SAME_PRECISION = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """A training run, as far as its memory goes.

    Args:
        backbone: Name of a backbone, as `create_backbone` takes it.
        num_classes: Outputs of the head.
        adapter: Settings of the adapter; None trains the head alone. Of it, `lora` takes rank, dropout and layers.
        method: `snell`, `full` (everything is trained), `linear` (the head alone) or `lora`.
        precision: Lightning's name: `32-true`, `bf16-mixed`, `16-mixed`, `bf16-true`, ...
        backbone_dtype: Type of the frozen weights, `float32` or `bfloat16`.
        image_size: Of the images, in pixels; by default the backbone's own.
        backbone_args: Further arguments of `create_backbone`.
        optimizer: Makes the optimizer from the trained parameters.

    Raises:
        UserError: The precision or the type is not known.
    """

    backbone: str
    num_classes: int
    adapter: SnellConfig | None = field(default_factory=SnellConfig)
    method: Method = "snell"
    precision: str = "32-true"
    backbone_dtype: str = "float32"
    image_size: ImageSize | None = None
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    optimizer: OptimizerFactory = torch.optim.AdamW

    def __post_init__(self) -> None:
        precision = str(self.precision)
        object.__setattr__(self, "precision", _SAME_PRECISION.get(precision, precision))
        if self.precision not in {**_AUTOCAST, **WHOLE}:
            raise UserError(f"memory is planned for precision {', '.join({**WHOLE, **_AUTOCAST})}, not {precision!r}")
        if self.backbone_dtype not in _DTYPES:
            raise UserError(f"backbone_dtype must be one of {', '.join(_DTYPES)}, not {self.backbone_dtype!r}")

    @property
    def label(self) -> str:
        """What the job does, in a word or two, such as `SNELL-32`."""
        if self.method == "full":
            return "full fine-tuning"
        if self.method == "linear" or self.adapter is None:
            return "linear probe"
        return f"{'LoRA' if self.method == 'lora' else 'SNELL'}-{self.adapter.rank}"


def levers(job: Job) -> dict[str, Job]:
    """The same job with one more setting that saves memory, by that setting as it is written in a config."""
    found: dict[str, Job] = {}
    if job.method == "snell" and job.adapter is not None:
        for choice in RECOMPUTE[RECOMPUTE.index(job.adapter.recompute) + 1 :]:
            adapter = replace(job.adapter, recompute=choice)
            found[f"model.adapter.recompute: {choice}"] = replace(job, adapter=adapter)
        if job.backbone_dtype == "float32" and job.precision in ("32-true", "bf16-mixed"):
            found["model.backbone_dtype: bfloat16"] = replace(job, backbone_dtype="bfloat16")
    if job.precision == "32-true":
        found["trainer.precision: bf16-mixed"] = replace(job, precision="bf16-mixed")
    return found


class LoraLayer(nn.Module):
    """A frozen layer with a low-rank update, `base(x) + B(A(dropout(x)))`, and the tensors that peft's LoRA makes.

    Args:
        base: An `nn.Linear`, or an `nn.Conv2d` with a 1x1 kernel.
        rank: Rows of A.
        dropout: Probability of dropping an entry of A's input.
    """

    def __init__(self, base: nn.Module, rank: int, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        if isinstance(base, nn.Conv2d):
            self.down: nn.Module = nn.Conv2d(base.in_channels, rank, 1, stride=base.stride, bias=False)  # type: ignore[arg-type]
            self.up: nn.Module = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            assert isinstance(base, nn.Linear)
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        """The frozen layer's, which some models look at."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The frozen layer's."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the update added, in the layer's own type."""
        y = self.base(x)
        x = x.to(self.down.weight.dtype)  # type: ignore[arg-type]
        return (y + self.up(self.down(self.dropout(x))) * 2.0).to(y.dtype)


def adapt(model: nn.Module, job: Job) -> nn.Module:
    """Make a plain model that of the job, in training mode."""
    if job.method == "linear" or (job.adapter is None and job.method != "full"):
        freeze_all_but_head(model)
    elif job.method == "snell":
        assert job.adapter is not None
        inject(model, job.adapter)
    elif job.method == "lora":
        assert job.adapter is not None
        _inject_lora(model, job.adapter)
    if job.backbone_dtype != "float32" and job.method != "full":
        cast_frozen(model, _DTYPES[job.backbone_dtype])
    if job.precision in ("64-true", "bf16-true", "16-true"):
        _to(model, WHOLE[job.precision])
    model.train()
    return model


def _inject_lora(model: nn.Module, config: SnellConfig) -> None:
    """Put LoRA where `inject` puts SNELL; head and tokens are trained as there."""
    for name in inject(model, config):
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, SnellLinear)
        # The plain layer itself: merging would make every update once.
        lora = LoraLayer(layer._plain[0], layer.config.rank, layer.config.dropout)
        setattr(model.get_submodule(parent), child, lora)
    # Or the layers that were taken out would live on in what watches them.
    unguard(model)


def _to(model: nn.Module, dtype: torch.dtype) -> None:
    """`model.to(dtype)`, which torch does not do to fake parameters."""
    if not any(isinstance(parameter, FakeTensor) for parameter in model.parameters()):
        model.to(dtype)
        return
    cast: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    if id(tensor) not in cast:
                        copy = tensor.detach().to(dtype)
                        trained = tensor.requires_grad
                        cast[id(tensor)] = nn.Parameter(copy, trained) if isinstance(tensor, nn.Parameter) else copy
                    tensors[name] = cast[id(tensor)]  # type: ignore[assignment]


@contextmanager
def forward_context(precision: str) -> Iterator[None]:
    """What Lightning runs forward under: autocast without its cache, or another default type."""
    if precision in _AUTOCAST:
        with torch.autocast("cpu", _AUTOCAST[precision], cache_enabled=False):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(WHOLE[precision])
    try:
        yield
    finally:
        torch.set_default_dtype(before)
