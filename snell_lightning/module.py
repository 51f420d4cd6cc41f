"""The LightningModule: a timm backbone with SNELL adapters, trained to classify images.

Thin glue. The mathematics is in `adapters/`, the images come from `data/`, and `callbacks/` watch and save. Checkpoints
hold the trained tensors alone: the frozen backbone comes from where it came from before, and its fingerprint is
checked.

timm is imported where it is used: the command line needs this class to print a help text or to refuse a config.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from snell_lightning.adapters import (
    SnellConfig,
    SnellLinear,
    UserError,
    adapter_parameters,
    adapter_state_dict,
    cast_frozen,
    check_adapter_state_dict,
    fingerprint,
    freeze_all_but_head,
    freeze_statistics,
    inject,
    load_adapter,
    read_adapter,
    updates_made_once,
)
from snell_lightning.adapters.injection import set_sparsity, set_value_updates, shared_sparsity, value_updates
from snell_lightning.adapters.names import plain_name
from snell_lightning.backbones import EMBEDDED_BACKBONE
from snell_lightning.backbones.sizes import ImageSize
from snell_lightning.metrics import SelectionMetric, stage_metrics
from snell_lightning.schedule import long_enough, warmup_cosine
from snell_lightning.thin import complete, thin_out

if TYPE_CHECKING:
    from timm.data import Mixup

Batch = tuple[Tensor, Tensor]


class ImageClassifier(LightningModule):
    """Image classification by tuning a pretrained backbone with SNELL.

    Args:
        backbone: A timm model name, `hf-hub:ORG/NAME`, `local-dir:PATH`, or the backbone that ships with the package.
        num_classes: Number of classes; on the command line it comes from the data.
        pretrained: Start from pretrained weights. If they cannot be had, that is an error.
        weights: A file of published weights for the backbone, or a folder with one, in the place of timm's own:
            safetensors, PyTorch or a JAX model's `.npz`, of timm, transformers or the model's authors.
        image_size: Of the images, in pixels: one number for squares, else height and width; the backbone's own if not
            given. On the command line it comes from the data.
        backbone_args: Further arguments of `timm.create_model`, such as `drop_path_rate`.
        backbone_dtype: Type in which the adapted layers' frozen weights are held. bfloat16 halves their memory and
            rounds them once; what is trained stays in fp32.
        adapter: What is tuned and how; null trains the head alone (a linear probe).
        adapter_file: An adapter file to start from, or to test or predict with. On the command line its settings hold.
        optimizer: Makes the optimizer from parameter groups.
        warmup: Fraction of all steps in which the learning rate rises linearly from `warmup_lr`, in [0, 1). Unless it
            is 0, at least 20 steps, or half of a run that has fewer than 40.
        warmup_lr: Learning rate of the first step.
        min_lr: Learning rate at the end of the cosine, which starts where the warm-up ends.
        layer_decay: Factor on the learning rate from each layer of the backbone to the one before it, in (0, 1].
        label_smoothing: Share of the target spread over all classes, in [0, 1).
        mixup: Alpha of Mixup; 0 is off.
        cutmix: Alpha of CutMix; 0 is off. With both on, each batch gets one of them.
        metric: What chooses the best epoch, on validation data: `accuracy`, `balanced_accuracy` (the mean of the
            classes' recalls), `macro_f1` (the mean of their F1 scores), or `auroc` (of two classes). It is logged
            beside the accuracy.
        val_name: What the values of the evaluation after each epoch are called where they are logged. On the command
            line it comes from the data.

    Raises:
        UserError: A value is out of its range, or the backbone or the adapter file cannot be used.
    """

    def __init__(
        self,
        backbone: str = EMBEDDED_BACKBONE,
        num_classes: int = 10,
        pretrained: bool = True,
        weights: str | None = None,
        image_size: ImageSize | None = None,
        backbone_args: dict[str, Any] | None = None,
        backbone_dtype: Literal["float32", "bfloat16"] = "float32",
        adapter: SnellConfig | None = SnellConfig(),  # noqa: B008 - never modified
        adapter_file: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup: float = 0.1,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-5,
        layer_decay: float = 1.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        metric: SelectionMetric = "accuracy",
        val_name: str = "val",
    ) -> None:
        super().__init__()
        adapter = SnellConfig(**adapter) if isinstance(adapter, dict) else adapter
        weights = None if weights is None else str(Path(weights).expanduser().resolve())
        self.save_hyperparameters(logger=False)
        self.hparams["weights"] = weights
        # Checkpoints hold plain values: given from Python, the optimizer is a function and stays out.
        if isinstance(self.hparams.get("adapter"), SnellConfig):
            self.hparams["adapter"] = asdict(self.hparams["adapter"])
        if callable(self.hparams.get("optimizer")):
            del self.hparams["optimizer"]
        _check_range("num_classes", num_classes, num_classes >= 1, "at least 1")
        check_training_settings(warmup, layer_decay, label_smoothing, mixup, cutmix)

        self.backbone_name, self.adapter_config, self.num_classes = backbone, adapter, num_classes
        self.optimizer_factory = _without_parser(optimizer)
        self.warmup, self.warmup_lr, self.min_lr, self.layer_decay = warmup, warmup_lr, min_lr, layer_decay
        self.label_smoothing, self.metric = label_smoothing, metric

        self.backbone_args, self.pretrained, self.weights = backbone_args or {}, pretrained, weights
        # Class names, and what else is known of the data that the weights were tuned on.
        self.class_names: tuple[str, ...] | None = None
        # How much an image of each class counts in the training loss; None where all count the same.
        self.loss_weights: Tensor | None = None
        # What an evaluation's values are called where they are logged.
        self.logged_as = {"val": val_name, "test": "test"}
        self._seen: dict[str, int | None] = dict.fromkeys(("train", "val", "test"))
        self.images_read = 0
        self._schedule: torch.optim.lr_scheduler.LambdaLR | None = None
        self._evaluation = ExitStack()

        from snell_lightning.backbones import create_backbone, require_image_size

        self.model = create_backbone(backbone, num_classes, pretrained, image_size, weights, **self.backbone_args)
        if weights is not None:
            rank_zero_info(f"weights: {self.model.loaded_weights}")
        if image_size is not None:
            require_image_size(backbone, self.model, image_size)
        if adapter is None:
            freeze_all_but_head(self.model)
        else:
            inject(self.model, adapter)
        if adapter_file is not None:
            self._start_from(adapter_file)
        self._frozen: str | None = None
        if backbone_dtype != "float32":
            # An adapter belongs to the pretrained weights, however they are held.
            self._frozen = fingerprint(self.model)
            cast_frozen(self.model, getattr(torch, backbone_dtype))

        self.mix = _mix(mixup, cutmix, label_smoothing, num_classes) if mixup or cutmix else None
        self.metrics = nn.ModuleDict(
            {f"{stage}_stage": stage_metrics(name, num_classes, metric) for stage, name in self.logged_as.items()}
        )

    @property
    def frozen_fingerprint(self) -> str:
        """SHA-256 of the frozen weights, computed once."""
        if self._frozen is None:
            self._frozen = fingerprint(self.model)
        return self._frozen

    def forward(self, images: Tensor) -> Tensor:
        """Images `(batch, 3, height, width)`, normalised, to logits `(batch, num_classes)`."""
        return self.model(images)

    def setup(self, stage: str) -> None:
        """Take the class names from the data, or see that they are those of the tuned weights.

        Raises:
            UserError: They differ.
        """
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if names is not None:
            if self.class_names not in (None, tuple(names)):
                raise _other_classes(self.class_names, names)
            self.class_names = tuple(names)

    def on_fit_start(self) -> None:
        """Say what is trained; batch norms that a strategy has put in since are as frozen as those before."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        layers = sum(isinstance(module, SnellLinear) for module in self.model.modules())
        rank_zero_info(
            f"model: {self.backbone_name}, {layers} layers adapted, {trained:,} of {total:,} parameters trained "
            f"({trained / total:.2%})"
        )
        freeze_statistics(self.model)
        weigh: Callable[[], Tensor | None] | None = getattr(
            getattr(self.trainer, "datamodule", None), "loss_weights", None
        )
        weights = weigh() if weigh is not None else None
        self.loss_weights = None if weights is None else weights.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        images, labels = batch
        self._seen["train"] = (self._seen["train"] or 0) + len(images)
        if len(images) == 0:
            # Every image was unreadable: no gradient, but this process stays in step with the others.
            loss = self(images.new_zeros(1, *images.shape[1:])).sum() * 0
        elif self.mix is not None and len(images) > 1:
            images, targets = self._mixed(images, labels)
            loss = F.cross_entropy(self(images), targets, self.loss_weights)
        else:
            loss = F.cross_entropy(self(images), labels, self.loss_weights, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_train_epoch_start(self) -> None:
        """Count the epoch's images. A run that is resumed at an epoch's end has no step left in it."""
        self._seen["train"] = None

    def on_train_epoch_end(self) -> None:
        """See that there was something to train on."""
        self._require_images("train")

    def on_validation_start(self) -> None:
        """From here to the end of the evaluation each update is made once; what is scored has been trained."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._require_images("train")
        self._start_evaluation()

    def on_validation_end(self) -> None:
        """What was made is dropped."""
        self._evaluation.close()

    def _start_evaluation(self) -> None:
        """From here to the end of the evaluation each update is made once."""
        self._evaluation.enter_context(updates_made_once(self.model))

    on_test_start = on_predict_start = _start_evaluation
    on_test_end = on_predict_end = on_validation_end

    def on_validation_epoch_end(self) -> None:
        """See that there was something to validate on, but for lightning's first look at a batch or two."""
        if not self.trainer.sanity_checking:
            self._require_images("val")
        self._seen["val"] = None

    def on_test_epoch_end(self) -> None:
        """See that there was something to test on."""
        self._require_images("test")
        self._seen["test"] = None

    def on_after_backward(self) -> None:
        """Once: every adapter must have a gradient. One that has none is of a layer that the backbone does not use."""
        if self.trainer.global_step == 0:
            idle = [name for name, parameter in adapter_parameters(self.model) if parameter.grad is None]
            if idle:
                layer = idle[0].split(".deltas.")[0]
                raise UserError(
                    f"the adapter of {layer} gets no gradient: {self.backbone_name!r} does not use the layer; "
                    "leave it out with model.adapter.exclude"
                )

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss and scores on validation data; the logits `(batch, num_classes)`."""
        return self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss and scores on test data; the logits `(batch, num_classes)`."""
        return self._evaluate("test", batch)

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Class probabilities `(batch, num_classes)`."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self._logits(images).softmax(-1)

    @property
    def selected_by(self) -> str:
        """Name of the logged value that chooses the best epoch; its largest is the best."""
        return f"{self.logged_as['val']}/{'acc1' if self.metric == 'accuracy' else self.metric}"

    def logged_names(self) -> list[str]:
        """Names of what training logs, for callbacks to look at."""
        scores = self.metrics["val_stage"]["scores"]  # type: ignore[index]
        return ["train/loss", f"{self.logged_as['val']}/loss", *scores, "lr"]

    def check_optimizer(self) -> None:
        """Make the optimizer and drop it.

        Raises:
            UserError: It does not take the parameters, or a setting of its own is out of range.
        """
        self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        groups = self._parameter_groups()
        try:
            optimizer = self.optimizer_factory(groups)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserError(
                f"model.optimizer does not take the parameters that are trained or a setting of its own: {error}"
            ) from error
        rate = max(float(group["lr"]) for group in optimizer.param_groups)
        _check_range("model.optimizer.lr", rate, rate > 0, "above 0")
        return optimizer

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over all that is trained, and a linear warm-up followed by a cosine, stepped every step."""
        optimizer = self._make_optimizer()
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_scale", 1.0)
            group.pop("param_names", None)
            group.pop("use_fallback", None)
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UserError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        base = max(float(group["lr"]) for group in optimizer.param_groups)
        warmup = long_enough(self.warmup, int(steps))
        schedule = warmup_cosine(int(steps), warmup, self.warmup_lr / base, self.min_lr / base)
        self._schedule = scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        self._configured = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """On resuming, what is configured now beats what the checkpoint's optimizer was configured with.

        Not with a schedule of somebody else's: of a subclass, or of a callback that has put its own in.
        """
        scheduler = self._schedule
        if scheduler is None or all(scheduler is not config.scheduler for config in self.trainer.lr_scheduler_configs):
            return
        for group, configured in zip(scheduler.optimizer.param_groups, self._configured, strict=True):
            group.update(configured)
        scheduler.base_lrs = [group["initial_lr"] for group in self._configured]
        for group, base, schedule in zip(
            scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * schedule(scheduler.last_epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained tensors only, and say which frozen weights they belong to."""
        trained = {f"model.{name}" for name in adapter_state_dict(self.model)}
        places = thin_out(checkpoint, {plain_name(name) for name in self.state_dict()}, trained)
        data = getattr(self._trainer, "datamodule", None)
        checkpoint["snell"] = {
            "backbone": self.backbone_name,
            "fingerprint": self.frozen_fingerprint,
            "thinned": places,
            "data": data.settings() if data is not None and hasattr(data, "settings") else {},
            "images_per_step": self._images_per_step(),
            "shared_sparsity": shared_sparsity(self.model),
            "value_updates": value_updates(self.model),
        }

    def _images_per_step(self) -> int | None:
        """Images that all processes together take in an optimizer's step; None where that is not known."""
        trainer = self._trainer
        batch = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
        return (
            None if trainer is None or batch is None else batch * trainer.world_size * trainer.accumulate_grad_batches
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint fits, and complete it with the frozen tensors the model has.

        Raises:
            UserError: It is of another backbone, other frozen weights or other classes, or lacks or adds a tensor.
        """
        made_on = checkpoint.get("snell")
        if made_on is None:
            raise UserError("the checkpoint was not written by snell_lightning: it does not say what its backbone is")
        if made_on["backbone"] != self.backbone_name:
            raise UserError(
                f"the checkpoint belongs to the backbone {made_on['backbone']!r}, not to {self.backbone_name!r}"
            )
        if names := made_on.get("data", {}).get("classes"):
            if self.class_names not in (None, tuple(names)):
                raise _other_classes(names, self.class_names)
            self.class_names = tuple(names)
        before, now = made_on.get("images_per_step"), self._images_per_step()
        if before is not None and now is not None and before != now and self.trainer.training:
            rank_zero_info(
                f"resume: a step has {now} images, and had {before} before (data.batch_size on each of "
                f"{self.trainer.world_size} processes, times trainer.accumulate_grad_batches)"
            )
        state = checkpoint["state_dict"]
        trained = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        check_adapter_state_dict(self.model, trained, "the checkpoint")
        if made_on["fingerprint"] != self.frozen_fingerprint:
            raise UserError(
                f"the checkpoint was made on other frozen weights of {self.backbone_name!r}; use the same ones"
            )
        set_sparsity(self.model, made_on.get("shared_sparsity", {}))
        set_value_updates(self.model, made_on.get("value_updates", ()))
        complete(checkpoint, made_on.get("thinned", [["state_dict"]]), self.state_dict())

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mixup or CutMix of a batch; of an odd batch the last image stays unmixed, since timm mixes in pairs."""
        even = len(images) // 2 * 2
        assert self.mix is not None
        mixed, targets = self.mix(images[:even].clone(), labels[:even])
        if even < len(images):
            rest = F.one_hot(labels[even:], self.num_classes).to(targets.dtype)
            rest = rest * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
            mixed, targets = torch.cat([mixed, images[even:]]), torch.cat([targets, rest])
        return mixed, targets

    def _logits(self, images: Tensor) -> Tensor:
        """Logits in fp32, also of an empty batch, which keeps processes in step and which backbones do not take."""
        if len(images) == 0:
            return self(images.new_zeros(1, *images.shape[1:])).float()[:0]
        return self(images).float()

    def _evaluate(self, stage: Literal["val", "test"], batch: Batch) -> Tensor:
        images, labels = batch
        self._seen[stage] = (self._seen[stage] or 0) + len(images)
        logits = self._logits(images)
        metrics: Any = self.metrics[f"{stage}_stage"]
        if len(images):
            metrics["loss"].update(F.cross_entropy(logits, labels, reduction="none"))
            metrics["scores"].update(logits, labels)
        self.log(f"{self.logged_as[stage]}/loss", metrics["loss"], on_step=False, on_epoch=True)
        self.log_dict(metrics["scores"], on_step=False, on_epoch=True, prog_bar=stage == "val")
        return logits

    def _start_from(self, adapter_file: str) -> None:
        """Load an adapter file; if it does not fit a backbone that was made otherwise, that is named as the cause."""
        try:
            metadata = load_adapter(adapter_file, self.model, self.backbone_name)
        except UserError as error:
            made = read_adapter(adapter_file)[1].get("backbone_args", self.backbone_args)
            if made == self.backbone_args:
                raise
            raise UserError(
                f"{adapter_file} was made with model.backbone_args {made}, and the backbone has {self.backbone_args}: "
                f"give it the file's ({error})"
            ) from error
        if "classes" in metadata:
            self.class_names = tuple(metadata["classes"])

    def _require_images(self, split: Literal["train", "val", "test"]) -> None:
        """Raise where no process could read an image of a split."""
        if (images := self._seen[split]) is None:
            return
        seen = torch.tensor(images, device=self.device)
        # Of the pass that ends, over all processes.
        self.images_read = int(self.trainer.strategy.reduce(seen, reduce_op="sum"))
        if not self.images_read:
            raise UserError(
                f"not one {split} image could be read: a score or a step without images means nothing; look at the "
                "files, or set data.on_bad_image to error to see why"
            )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters, without weight decay on vectors and tokens, with a scale per layer if asked for."""
        from timm.optim import param_groups_layer_decay, param_groups_weight_decay

        no_decay = set(getattr(self.model, "no_weight_decay", set)())
        no_decay |= {name for name, _ in self.model.named_parameters() if name.endswith(("_token", "_tokens"))}
        if self.layer_decay < 1:
            groups = param_groups_layer_decay(self.model, no_weight_decay_list=no_decay, layer_decay=self.layer_decay)
        else:
            groups = param_groups_weight_decay(self.model, no_weight_decay_list=no_decay)
        for group in groups:
            # Only the exception is fixed here: the optimizer's own setting holds for the rest.
            if group["weight_decay"] != 0:
                del group["weight_decay"]
        return [group for group in groups if group["params"]]


def _without_parser(factory: Callable[..., Any]) -> Callable[..., Any]:
    """What makes the optimizer, alone: jsonargparse's holds the parser, and so all that the command line has made."""
    if isinstance(factory, partial) and len(factory.args) == 2 and isinstance(factory.args[1], type):
        return partial(factory.args[1], **factory.keywords)
    return factory


def _other_classes(model: Sequence[str] | None, data: Sequence[str] | None) -> UserError:
    return UserError(
        f"the tuned model's classes are {', '.join(model or ())}, and the data's are {', '.join(data or ())}; give the "
        "data module the model's as classes (data.classes), and the folders their names"
    )


def check_training_settings(
    warmup: float, layer_decay: float, label_smoothing: float, mixup: float, cutmix: float
) -> None:
    """Check the ranges of those arguments of `ImageClassifier`.

    Raises:
        UserError: One is out of its range.
    """
    _check_range("warmup", warmup, 0 <= warmup < 1, "at least 0 and below 1: a fraction of all steps")
    _check_range("layer_decay", layer_decay, 0 < layer_decay <= 1, "above 0 and at most 1")
    _check_range("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "at least 0 and below 1")
    _check_range("mixup", mixup, mixup >= 0, "at least 0")
    _check_range("cutmix", cutmix, cutmix >= 0, "at least 0")


def _mix(mixup: float, cutmix: float, label_smoothing: float, num_classes: int) -> "Mixup":
    """Mixup and CutMix of a batch as timm does them, with soft targets."""
    from timm.data import Mixup

    return Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=num_classes)


def _check_range(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"{name} must be {expected}, not {value}")
