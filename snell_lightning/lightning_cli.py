"""LightningCLI for `ImageClassifier` and `ImageDataModule`: arguments, links between them, and named callbacks."""

from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from snell_lightning.adapters import SnellConfig
from snell_lightning.callbacks import AdapterCheckpoint, FiniteLoss, PredictionWriter, SnellMonitor
from snell_lightning.data import ImageDataModule
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


class SnellCLI(LightningCLI):
    """LightningCLI for `ImageClassifier` and `ImageDataModule`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name the callbacks, and let the data decide what follows from it."""
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SnellMonitor, "monitor")
        parser.link_arguments("model.backbone", "data.backbone")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Refuse wrong settings of the model at once: it is made after the data, which may take long to list."""
        model = self.config.get(str(self.subcommand), self.config).model
        check_training_settings(model.warmup, model.layer_decay, model.label_smoothing, model.mixup, model.cutmix)
        if model.adapter is not None:
            SnellConfig(**model.adapter)

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
        parser_class=SnellParser,
        seed_everything_default=0,
        trainer_defaults={
            # The module says in one line what it trains.
            "enable_model_summary": False,
            "callbacks": [FiniteLoss(), PredictionWriter()],
            "logger": {"class_path": "snell_lightning.logger.RunLogger"},
        },
        save_config_kwargs={"overwrite": False},
        auto_configure_optimizers=False,
        run=run,
        args=list(arguments),
    )
