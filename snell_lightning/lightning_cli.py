"""LightningCLI for `ImageClassifier` and `ImageDataModule`: arguments, links between them, and named callbacks."""

from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from snell_lightning.adapters import SnellConfig
from snell_lightning.callbacks import AdapterCheckpoint, FiniteLoss, PredictionWriter, SnellMonitor
from snell_lightning.data import ImageDataModule
from snell_lightning.help import COMMANDS, PROGRAM, TITLE
from snell_lightning.messages import ConfigError
from snell_lightning.module import ImageClassifier, check_training_settings


class SnellParser(LightningArgumentParser):
    """A parser whose errors are one line that names the nearest valid key, and that takes keys in full only."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise, in place of printing the usage and leaving.

        The text stays as it is here: parsers are nested, and the outer one quotes the inner one's.
        """
        raise ConfigError(message) from ex


class SnellTrainer(Trainer):
    """Lightning's Trainer with one verb more."""

    def memory(self, model: Any, datamodule: ImageDataModule, budget: str | None = None) -> None:
        """Plan the memory of a training step, without running one and without loading the backbone.

        Prints what one process takes, by phase and by batch size, beside full fine-tuning, LoRA and a linear probe.

        Args:
            model: The job, as `SnellCLI` describes it for this verb.
            datamodule: Its data.
            budget: Memory to fit into, such as 8GiB: prints the largest batch, and the setting that would help most.
        """
        from snell_lightning.memory import parse_bytes, report

        report(model, datamodule.batch_size, None if budget is None else parse_bytes(budget))


class SnellCLI(LightningCLI):
    """LightningCLI for `ImageClassifier` and `ImageDataModule`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands and our own, with the arguments that are not the user's to give."""
        own = {command: LightningCLI.subcommands()[command] | {"verbose"} for command in ("validate", "test")}
        return {**LightningCLI.subcommands(), **own, "memory": {"model", "datamodule"}}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """The arguments of a verb; the table of scores is `SnellMonitor`'s instead of lightning's."""
        quiet = {"verbose": False} if subcommand in ("validate", "test") else {}
        return {**super()._prepare_subcommand_kwargs(subcommand), **quiet}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name the callbacks, and let the data decide what follows from it."""
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SnellMonitor, "monitor")
        parser.link_arguments("model.backbone", "data.backbone")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Refuse wrong settings of the model at once: it is made after the data, which may take long to list."""
        model = self.config.get(str(self.subcommand), self.config).model
        check_training_settings(model.warmup, model.layer_decay, model.label_smoothing, model.mixup, model.cutmix)
        if model.adapter is not None:
            SnellConfig(**model.adapter)
        if self.subcommand == "memory":
            # For a plan the model is described, not made.
            self.parser.add_instantiator(self._describe, ImageClassifier, subclasses=False, prepend=True)
            # Nothing runs: a job for eight GPUs is planned on a machine without one.
            trainer = self.config.memory.trainer
            self._planned_precision = trainer.precision or "32-true"
            trainer.precision, trainer.accelerator, trainer.devices = None, "cpu", 1
            trainer.num_nodes, trainer.strategy, trainer.logger = 1, "auto", False

    def _describe(self, _: type, **settings: Any) -> Any:
        from snell_lightning.memory import Job

        return Job(
            backbone=settings["backbone"],
            num_classes=settings["num_classes"],
            adapter=settings["adapter"],
            precision=self._planned_precision,
            backbone_dtype=settings["backbone_dtype"],
            image_size=self.config.memory.data.image_size,
            backbone_args=settings["backbone_args"] or {},
            optimizer=settings["optimizer"],
        )

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's settings were put below the command line's by `arrange_arguments` already."""


def run_cli(arguments: Sequence[str], run: bool) -> SnellCLI:
    """Parse arguments and carry them out.

    Args:
        arguments: The command line without the program's name, in the order of precedence.
        run: False makes trainer, model and data without running them; `arguments` then starts with no command.
    """
    # Processes that lightning starts run this process's own command line again, so `sys.argv` stays as it is.
    return SnellCLI(
        ImageClassifier,
        ImageDataModule,
        trainer_class=SnellTrainer,
        parser_class=SnellParser,
        seed_everything_default=0,
        trainer_defaults={
            # The module says in one line what it trains.
            "enable_model_summary": False,
            "callbacks": [FiniteLoss(), PredictionWriter()],
            "logger": {"class_path": "snell_lightning.logger.RunLogger"},
        },
        save_config_kwargs={"overwrite": False},
        parser_kwargs={
            "description": TITLE,
            "prog": PROGRAM,
            **{command: {"description": text} for command, text in COMMANDS.items()},
        },
        auto_configure_optimizers=False,
        run=run,
        args=list(arguments),
    )
