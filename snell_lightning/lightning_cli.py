"""LightningCLI for `ImageClassifier` and `ImageDataModule`: arguments, links between them, and named callbacks."""

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from snell_lightning.adapters import SnellConfig, UserError
from snell_lightning.adapters.whole import whole
from snell_lightning.arguments import slurm_job, tell
from snell_lightning.callbacks import AdapterCheckpoint, ClassReport, FiniteLoss, PredictionWriter, SnellMonitor
from snell_lightning.checks import check_trainer_settings, check_training
from snell_lightning.data import ImageDataModule
from snell_lightning.data.datamodule import DataToCheck
from snell_lightning.help import COMMANDS, PROGRAM, TITLE
from snell_lightning.launch import adopt, join, launched, require_agreement, untried
from snell_lightning.messages import ConfigError, one_line
from snell_lightning.module import ImageClassifier, check_training_settings
from snell_lightning.runs import CONFIG, Run, root_of, short
from snell_lightning.trainer import SnellTrainer

# Verbs that neither train nor evaluate.
_PLANS = ("memory", "check_data")


class SnellParser(LightningArgumentParser):
    """A parser whose errors are one line that names the nearest valid key, and that takes keys in full only."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise, in place of printing the usage and leaving.

        The text stays as it is here: parsers are nested, and the outer one quotes the inner one's.
        """
        raise ConfigError(message) from ex


class RunConfig(SaveConfigCallback):
    """Save the resolved config in the run's folder, and give it to the loggers as hyperparameters."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **_: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where the file goes, and save it."""
        # Reading `log_dir` talks to the other processes, so all of them do it here.
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it, beside that of the run before where one is continued."""
        path, number = self._folder / CONFIG, 0
        while path.exists():
            number += 1
            path = self._folder / f"{Path(CONFIG).stem}_{number}.yaml"
        with whole(path) as part:
            self.parser.save(self.config, part, skip_none=False, multifile=False)
        if number == 0:
            settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            for logger in trainer.loggers:
                logger.log_hyperparams(settings)


class SnellCLI(LightningCLI):
    """LightningCLI for `ImageClassifier` and `ImageDataModule`."""

    def __init__(self, *args: Any, continued: Path | None = None, facts: Mapping[str, Any], **kwargs: Any) -> None:
        self._continued, self._facts = continued, facts
        self._launch: dict[str, Any] = {}
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands and our own, with the arguments that are not the user's to give."""
        own = {command: LightningCLI.subcommands()[command] | {"verbose"} for command in ("validate", "test")}
        return {**LightningCLI.subcommands(), **own, **{verb: {"model", "datamodule"} for verb in _PLANS}}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """The arguments of a verb; the table of scores is `SnellMonitor`'s instead of lightning's."""
        quiet = {"verbose": False} if subcommand in ("validate", "test") else {}
        return {**super()._prepare_subcommand_kwargs(subcommand), **quiet}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Name the callbacks, and let the data decide what follows from it."""
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SnellMonitor, "monitor")
        parser.add_lightning_class_args(ClassReport, "report")
        parser.link_arguments("model.backbone", "data.backbone")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")
        parser.link_arguments("data.val_name", "model.val_name", apply_on="instantiate")

    def before_instantiate_classes(self) -> None:
        """Refuse wrong settings of the model at once: it is made after the data, which may take long to list."""
        model = self.config.get(str(self.subcommand), self.config).model
        check_training_settings(model.warmup, model.layer_decay, model.label_smoothing, model.mixup, model.cutmix)
        if model.adapter is not None:
            SnellConfig(**model.adapter)
        if self.subcommand in _PLANS:
            # Here the model is described, not made.
            self.parser.add_instantiator(self._describe, ImageClassifier, subclasses=False, prepend=True)
            # Nothing runs: a job for eight GPUs is planned on a machine without one.
            if self.subcommand == "check_data":
                self.parser.add_instantiator(_to_check, ImageDataModule, subclasses=False, prepend=True)
            trainer = self.config[self.subcommand].trainer
            self._planned_precision = trainer.precision or "32-true"
            trainer.precision, trainer.accelerator, trainer.devices = None, "cpu", 1
            trainer.num_nodes, trainer.strategy, trainer.logger = 1, "auto", False
            return
        trainer = self._get(self.config, "trainer")
        if trainer.logger is True:
            trainer.logger = Namespace(class_path="snell_lightning.logger.RunLogger", init_args=Namespace())
        counts = {key: trainer.get(key) for key in ("accelerator", "devices", "num_nodes", "strategy")}
        launch = launched()
        if (line := adopt(counts, launch)) is not None:
            tell(line)
        self._launch = {key: value for key, value in counts.items() if trainer.get(key) != value}
        check_trainer_settings(trainer)
        if (line := untried(counts["strategy"])) is not None:
            tell(line)
        join(counts, launch, trainer.timeout)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, and say which run this is."""
        settings = self._get(self.config, "trainer").as_dict()
        checkpoint = self._get(self.config_init, "checkpoint")
        if settings["enable_checkpointing"] is False:
            # Lightning refuses the callback; this way it leaves the adapter alone.
            checkpoint.adapter_only = True
            kwargs["enable_checkpointing"] = True
        trainer = super().instantiate_trainer(**{**self._launch, **kwargs})
        assert isinstance(trainer, SnellTrainer)
        if self.subcommand not in _PLANS:
            require_agreement(trainer.world_size)
        trainer.prepare(Run(root_of(settings), self._run_name(settings), self._facts, self._continued))
        return trainer

    def _run_name(self, settings: Mapping[str, Any]) -> str:
        """The name of the run's folder: as given, and for evaluations with the verb before it."""
        logger = settings.get("logger")
        version = logger.get("init_args", {}).get("version") if isinstance(logger, Mapping) else None
        training = self.subcommand in (None, "fit")
        if version is None:
            return "version_*" if training else f"{self.subcommand}_*"
        named = version if isinstance(version, str) else f"version_{version}"
        return named if training else f"{self.subcommand}_{named}"

    def before_fit(self) -> None:
        """Refuse what would fail at the first step or after the first epoch, before there is a folder."""
        check_training(self.trainer, self.model)

    def _run_subcommand(self, subcommand: str) -> None:
        """Carry the verb out; afterwards the run is finished, or was stopped by a signal, or failed."""
        trainer = self.trainer
        assert isinstance(trainer, SnellTrainer)
        assert trainer.run is not None
        try:
            super()._run_subcommand(subcommand)
            trainer.run.finish()
        except (SystemExit, KeyboardInterrupt):
            if trainer.stopped_by is None:
                raise
            run = trainer.run
            advice = f"; to go on: --resume {short(run.folder)}" if run.folder and run.checkpoints() else ""
            tell(f"stopped by {signal.Signals(trainer.stopped_by).name}{advice}")
            if trainer.to_be_queued_again and trainer.is_global_zero:
                _queue_again()
            raise SystemExit(128 + trainer.stopped_by) from None
        except OSError as error:
            raise UserError(_unwritable(error, trainer.run)) from error
        finally:
            trainer.run.release()

    def _describe(self, _: type, **settings: Any) -> Any:
        from snell_lightning.memory import Job

        return Job(
            backbone=settings["backbone"],
            num_classes=settings["num_classes"],
            adapter=settings["adapter"],
            precision=self._planned_precision,
            backbone_dtype=settings["backbone_dtype"],
            image_size=self.config[self.subcommand].data.image_size,
            backbone_args=settings["backbone_args"] or {},
            optimizer=settings["optimizer"],
        )

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's settings were put below the command line's by `arrange_arguments` already."""


def _to_check(_: type, **settings: Any) -> DataToCheck:
    # Where the papers validate on test images, those are not in two splits.
    return DataToCheck(**{**settings, "protocol": "validation"})


def _unwritable(error: OSError, run: Run) -> str:
    """What to say where the run cannot go on for want of a file, and what is left of it."""
    line = one_line(error) or str(error)
    if run.folder is None:
        return line
    if not run.folder.is_dir():
        return f"the run's folder {run.folder} is not there any more, and with it what the run has left"
    if not error.filename:
        line = f"{line}: {short(run.folder)}"
    left = sorted(run.checkpoints(), key=lambda path: path.stat().st_mtime)
    if not left:
        return line
    return f"{line}; {short(left[-1])} is whole: once that is mended, go on with --resume {short(run.folder)}"


def _queue_again() -> None:
    """Have SLURM start this job anew; it goes on with its own run then."""
    job = str(slurm_job())
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        problem = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    tell(f"SLURM job {job} is queued again" if problem is None else f"SLURM job {job} is not queued again: {problem}")


def run_cli(
    arguments: Sequence[str], run: bool, continued: Path | None = None, facts: Mapping[str, Any] | None = None
) -> SnellCLI:
    """Parse arguments and carry them out.

    Args:
        arguments: The command line without the program's name, in the order of precedence.
        run: False makes trainer, model and data without running them; `arguments` then starts with no command.
        continued: Folder of the run that goes on; None for a new run.
        facts: What to know the run again by.
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
        save_config_callback=RunConfig,
        parser_kwargs={
            "description": TITLE,
            "prog": PROGRAM,
            **{verb: {"description": COMMANDS[verb.replace("_", "-")]} for verb in SnellCLI.subcommands()},
        },
        auto_configure_optimizers=False,
        run=run,
        args=list(arguments),
        continued=continued,
        facts=facts or {},
    )
