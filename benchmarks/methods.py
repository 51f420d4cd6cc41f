"""The methods that are compared, each built from the same backbone with the same weights.

| name              | what is trained                                                                              |
|-------------------|----------------------------------------------------------------------------------------------|
| `full`            | everything                                                                                   |
| `linear`          | the head alone                                                                               |
| `lora`            | Hugging Face peft's LoRA on the layers that `snell_lightning.inject` adapts, head, cls_token |
| `dora`            | the same with peft's DoRA                                                                    |
| `snell`           | `snell_lightning.inject`: factors, head, cls_token                                           |
| `straightforward` | the same by `benchmarks.straightforward`                                                     |

A variant is a method with settings of its own: `METHOD[:SETTING=VALUE]...`. Which settings a method reads is in
`READS`; `snell` reads every other field of `SnellConfig` as well, in YAML.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from benchmarks.straightforward import StraightforwardLinear
from snell_lightning.adapters import (
    SnellConfig,
    SnellLinear,
    UserError,
    adapter_parameters,
    cast_frozen,
    freeze_all_but_head,
    inject,
)

PRECISIONS = ("fp32", "bf16-mixed")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What a method is run with. Each method reads some of it (`READS`) and ignores the rest.

    Args:
        precision: `fp32`, or `bf16-mixed` for autocast to bf16.
        rank: Columns of the factors.
        sparsity: Fraction of the update's entries that loses.
        recompute: `none`, `inputs` or `blocks`.
        backbone_dtype: Type of the adapted layers' frozen weights.
        dropout: Of the update's input.
        drop_path: Of the update's output, per sample. Nothing drops in the backbone itself.
        lora_dropout: LoRA's dropout of its input.
        others: Further fields of `SnellConfig`.
    """

    precision: str = "fp32"
    rank: int = 32
    sparsity: float = 0.9
    recompute: str = "inputs"
    backbone_dtype: str = "float32"
    dropout: float = 0.0
    drop_path: float = 0.0
    lora_dropout: float = 0.0
    others: dict[str, Any] = field(default_factory=dict)


READS = {
    "full": ("precision", "recompute"),
    "linear": ("precision",),
    "lora": ("precision", "rank", "recompute", "lora_dropout"),
    "dora": ("precision", "rank", "recompute", "lora_dropout"),
    "snell": ("precision", "rank", "sparsity", "recompute", "backbone_dtype", "dropout", "drop_path"),
    "straightforward": ("precision", "rank", "sparsity", "dropout", "drop_path"),
}
# What a method starts from instead of the general settings; a variant may still change it.
_OWN: dict[str, dict[str, Any]] = {
    "full": {"recompute": "none"},
    "linear": {},
    "lora": {"recompute": "none"},
    "dora": {"recompute": "none"},
    "snell": {},
    "straightforward": {"dropout": 0.1, "drop_path": 0.0},
}
_CHOICES = {"precision": PRECISIONS, "recompute": ("none", "inputs", "blocks"), "backbone_dtype": tuple(DTYPES)}


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes:
        label: As it was written, `snell:recompute=blocks`.
        method: Its part before the first colon.
        settings: General settings, changed by those of the label.
    """

    label: str
    method: str
    settings: Settings

    def read_settings(self) -> dict[str, Any]:
        """The settings that have a say in this variant."""
        return {name: getattr(self.settings, name) for name in READS[self.method]} | self.settings.others


@dataclass(frozen=True)
class Backbone:
    """A timm model.

    Args:
        name: timm's name, or `local-dir:FOLDER`.
        classes: Outputs of the head.
        image_size: Side of the images in pixels, or `None` for the model's own.
        blocks: Keep only the first so many blocks, or `None` for all.
        seed: Of random weights, the head's among them, and of images.
        pretrained: Whether the weights are the pretrained ones.
    """

    name: str
    classes: int = 100
    image_size: int | None = None
    blocks: int | None = None
    seed: int = 0
    pretrained: bool = False

    def create(self, device: torch.device) -> nn.Module:
        """The model in training mode; the same seed gives the same weights."""
        torch.manual_seed(self.seed)
        with torch.device(device):
            model = self._create(pretrained=self.pretrained and device.type != "meta")
        if self.blocks is not None:
            if not isinstance(getattr(model, "blocks", None), (nn.Sequential, nn.ModuleList)):
                raise UserError(f"{self.name} has no list of blocks to shorten; leave --blocks out")
            model.blocks = model.blocks[: self.blocks]  # type: ignore[index]
        return model.train()

    def images(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random images `(batch, 3, side, side)` and labels `(batch,)`."""
        generator = torch.Generator().manual_seed(self.seed)
        side = self.image_size
        if side is None:
            described = timm.get_pretrained_cfg(self.name)
            side = described.input_size[-1] if described else 224
        images = torch.randn(batch, 3, side, side, generator=generator)
        labels = torch.randint(self.classes, (batch,), generator=generator)
        return images.to(device), labels.to(device)

    def _create(self, pretrained: bool) -> nn.Module:
        # Pretrained weights come with a head of their own, or with none.
        arguments: dict[str, Any] = {"pretrained": True} if pretrained else {"num_classes": self.classes}
        try:
            sized = {} if self.image_size is None else {"img_size": self.image_size}
            model = timm.create_model(self.name, **sized, **arguments)
        except TypeError:  # Not every family needs to know the size.
            model = timm.create_model(self.name, **arguments)
        if pretrained:
            model.reset_classifier(self.classes)
        return model


@dataclass
class Subject:
    """A model that is ready to be trained, and its step in three parts.

    Attributes:
        model: In training mode.
        optimizer: AdamW over the trainable parameters.
        precision: `fp32` or `bf16-mixed`.
        images: `(batch, 3, side, side)`.
        labels: `(batch,)`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    precision: str
    images: Tensor
    labels: Tensor

    def forward(self) -> Tensor:
        """The loss."""
        with autocast(self.images.device, self.precision):
            return F.cross_entropy(self.model(self.images), self.labels)

    def step(self) -> None:
        """All three parts, leaving no gradient behind."""
        self.forward().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that a forward runs in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


def parse_variants(text: str, general: Settings) -> list[Variant]:
    """Variants separated by commas.

    Raises:
        UserError: A method or setting is unknown, a value cannot be read, or a variant comes twice.
    """
    variants = [_parse_variant(label.strip(), general) for label in text.split(",") if label.strip()]
    labels = [variant.label for variant in variants]
    twice = {label for label in labels if labels.count(label) > 1}
    if twice or not variants:
        raise UserError(f"{twice.pop()!r} is named twice" if twice else "name at least one method")
    return variants


def build(variant: Variant, backbone: Backbone, batch: int, device: torch.device) -> Subject:
    """The variant's model, its optimizer and the images, the same for every variant."""
    model = make_model(variant, backbone, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    return Subject(model, optimizer, variant.settings.precision, *backbone.images(batch, device))


def make_model(variant: Variant, backbone: Backbone, device: torch.device) -> nn.Module:
    """The variant's model in training mode, with `requires_grad` set on what it trains."""
    return _BUILDERS[variant.method](backbone.create(device), variant.settings, backbone)


@dataclass(frozen=True)
class Adapted:
    """What `inject` does to a backbone.

    Attributes:
        slices: Updates of each adapted layer, by its name.
        extras: Names of the parameters trained besides the adapter.
    """

    slices: dict[str, int]
    extras: list[str]


def adapted(backbone: Backbone) -> Adapted:
    """What `inject` would adapt and train, found on a model without storage."""
    model = backbone.create(torch.device("meta"))
    names = inject(model, SnellConfig())
    own = {name for name, _ in adapter_parameters(model)}
    return Adapted(
        {name: len(layer.deltas) for name in names if isinstance(layer := model.get_submodule(name), SnellLinear)},
        [name for name, parameter in model.named_parameters() if parameter.requires_grad and name not in own],
    )


def _full(model: nn.Module, settings: Settings, backbone: Backbone) -> nn.Module:
    _recompute_by_timm(model, settings)
    return model


def _linear(model: nn.Module, settings: Settings, backbone: Backbone) -> nn.Module:
    freeze_all_but_head(model)
    return model


def _lora(model: nn.Module, settings: Settings, backbone: Backbone) -> nn.Module:
    return _by_peft(model, settings, backbone, dora=False)


def _dora(model: nn.Module, settings: Settings, backbone: Backbone) -> nn.Module:
    return _by_peft(model, settings, backbone, dora=True)


def _by_peft(model: nn.Module, settings: Settings, backbone: Backbone, dora: bool) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise UserError("methods lora and dora need peft: pip install -e '.[bench]'") from error
    _recompute_by_timm(model, settings)
    found = adapted(backbone)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        lora_dropout=settings.lora_dropout,
        use_dora=dora,
        target_modules=list(found.slices),
    )
    wrapped = peft.get_peft_model(model, config)
    for name in found.extras:
        wrapped.get_base_model().get_parameter(name).requires_grad_(True)
    return wrapped


def _snell(model: nn.Module, settings: Settings, backbone: Backbone) -> nn.Module:
    named = {name: getattr(settings, name) for name in ("rank", "sparsity", "recompute", "dropout", "drop_path")}
    inject(model, SnellConfig(**named, **settings.others))
    if settings.backbone_dtype != "float32":
        cast_frozen(model, DTYPES[settings.backbone_dtype])
    return model


def _straightforward(model: nn.Module, settings: Settings, backbone: Backbone) -> nn.Module:
    found = adapted(backbone)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in found.extras)
    for name, slices in found.slices.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise UserError(f"straightforward adapts linear layers alone, and {name} is {type(layer).__name__}")
        tuned = StraightforwardLinear(
            layer, settings.rank, settings.sparsity, slices, settings.dropout, settings.drop_path
        )
        model.set_submodule(name, tuned)
    return model


_BUILDERS: dict[str, Callable[[nn.Module, Settings, Backbone], nn.Module]] = {
    "full": _full,
    "linear": _linear,
    "lora": _lora,
    "dora": _dora,
    "snell": _snell,
    "straightforward": _straightforward,
}


def _recompute_by_timm(model: nn.Module, settings: Settings) -> None:
    if settings.recompute == "inputs":
        raise UserError("recompute=inputs is SNELL's own; full and lora know none and blocks (timm's checkpointing)")
    if settings.recompute == "blocks":
        model.set_grad_checkpointing(True)  # type: ignore[operator]


def _parse_variant(label: str, general: Settings) -> Variant:
    method, *options = label.split(":")
    if method not in READS:
        raise UserError(f"unknown method {method!r}; there are {', '.join(READS)}")
    changes: dict[str, Any] = {}
    others: dict[str, Any] = {}
    further = {field.name for field in dataclasses.fields(SnellConfig)} if method == "snell" else set()
    for option in options:
        name, equals, text = option.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in {*READS[method], *further}:
            known = ", ".join((*READS[method], *sorted(further - {*READS[method]})))
            raise UserError(f"{option!r} in {label!r} is no SETTING=VALUE of {method}, which reads {known}")
        if name in READS[method]:
            changes[name] = _read(name, text, label)
        else:
            others[name] = yaml.safe_load(text)
    return Variant(label, method, replace(general, **{**_OWN[method], **changes}, others=others))


def _read(name: str, text: str, label: str) -> Any:
    wanted = type(getattr(Settings(), name))
    try:
        value = wanted(text)
    except ValueError as error:
        raise UserError(f"{name} in {label!r} must be {wanted.__name__}, not {text!r}") from error
    if name in _CHOICES and value not in _CHOICES[name]:
        raise UserError(f"{name} in {label!r} must be one of {', '.join(_CHOICES[name])}, not {text!r}")
    return value
