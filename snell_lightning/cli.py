"""The command line: LightningCLI with shipped configs, named callbacks, and errors of one line.

    python -m snell_lightning {fit,validate,test,predict} --config vit.yaml [--config MORE.yaml ...] [--KEY VALUE ...]

What is given later wins: built-in defaults, then configs from left to right, then the settings a checkpoint was made
with (where `--ckpt_path` names one), then values on the command line, wherever they stand.
"""

import difflib
import inspect
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from snell_lightning.adapters import SnellConfig, UserError, read_adapter
from snell_lightning.callbacks import AdapterCheckpoint, FiniteLoss, PredictionWriter, SnellMonitor
from snell_lightning.data import ImageDataModule
from snell_lightning.module import ImageClassifier

_PACKAGE = Path(__file__).parent
# In a checkout the configs stand beside the package, in an installed wheel inside it.
SHIPPED_CONFIGS = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()),
    _PACKAGE / "configs",
)
_DEBUG = "SNELL_DEBUG"


class ConfigError(UserError):
    """What jsonargparse says about a command line or a config, in its own words."""


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

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's settings were put below the command line's by `arrange_arguments` already."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends it with one line on stderr and status 1.

    Args:
        arguments: The command line without the program's name; by default that of this process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if os.environ.get(_DEBUG):
        make_cli(arguments)
        return
    try:
        make_cli(arguments)
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK"))
        where = f" [process {rank}]" if rank is not None else ""
        print(f"error{where}: {line}", file=sys.stderr)
        raise SystemExit(1) from None


def make_cli(arguments: Sequence[str], run: bool = True) -> SnellCLI:
    """Parse a command line and carry it out.

    Args:
        arguments: The command line without the program's name.
        run: False makes trainer, model and data without running them; `arguments` then starts with no command.
    """
    _quieten()
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
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": "runs", "name": ""},
            },
        },
        save_config_kwargs={"overwrite": False},
        auto_configure_optimizers=False,
        run=run,
        args=arrange_arguments(arguments),
    )


def arrange_arguments(arguments: Sequence[str]) -> list[str]:
    """Put a command line into the order of precedence: command, configs, settings from files, values.

    The settings are those of the checkpoint or the adapter that `--ckpt_path` or `--model.adapter_file` names.

    For example `fit --data.seed 4 --config vit.yaml` becomes `fit --config .../vit.yaml --data.seed 4`.

    Raises:
        UserError: A config is neither a file nor shipped, or it or the checkpoint cannot be read.
    """
    command = [argument for argument in arguments[:1] if not argument.startswith("-")]
    configs: list[str] = []
    values: list[str] = []
    sources: dict[str, str] = {}
    rest = iter(arguments[len(command) :])
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            path = find_config(value if equals else _value(rest, name))
            _check_config(path)
            configs += ["--config", path]
            continue
        values.append(argument)
        if name in _SETTINGS_FROM:
            sources[name] = value if equals else _value(rest, name)
            if not equals:
                values.append(sources[name])
    for name, path in sources.items():
        if path not in ("best", "last", "hpc", "null"):
            configs += ["--config", json.dumps({"model": _SETTINGS_FROM[name](path)})]
    return [*command, *configs, *values]


def find_config(name: str) -> str:
    """The path of a config: the file of that name, or else the shipped config.

    Raises:
        UserError: There is neither.
    """
    if Path(name).is_file():
        return name
    if (SHIPPED_CONFIGS / name).is_file():
        return str(SHIPPED_CONFIGS / name)
    shipped = sorted(str(path.relative_to(SHIPPED_CONFIGS)) for path in SHIPPED_CONFIGS.rglob("*.yaml"))
    near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped)}"
    raise UserError(f"there is no config file {name!r}, neither here nor among the shipped ones; {hint}")


def one_line(error: BaseException) -> str | None:
    """What to tell a user about an error, on one line; None where it is no user's mistake but a fault of ours."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the device ran out of memory; lower data.batch_size and raise trainer.accumulate_grad_batches by the "
            "same factor"
        )
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename}" if error.filename else " ".join(str(error).split())
    if isinstance(error, ConfigError) or type(error).__module__.startswith("jsonargparse"):
        return explain(str(error))
    if isinstance(error, ValueError) and str(error).startswith("Does not validate against"):
        # What jsonargparse makes of an error that a settings class raised.
        return explain(str(error))
    # Lightning tells of wrong trainer settings, such as an unknown accelerator, by plain value errors of its own.
    if isinstance(error, (UserError, MisconfigurationException)) or (
        isinstance(error, ValueError) and _raised_in(error).startswith("lightning.")
    ):
        return " ".join(str(error).split())
    return None


def explain(message: str) -> str:
    """One line for what jsonargparse says in many: the key, what is wrong with it, the nearest key if it is unknown."""
    text = " ".join(message.split())
    key = re.search(r'(?:Parser key|key) "([\w.]+)"', text)
    option = re.search(r"Option '([\w.]+)' is not accepted", text)
    unknown = re.search(
        r"Key '([\w.]+)' is not expected|nrecognized arguments: --([\w.]+)|ambiguous option: --([\w.]+)"
        r"|does not accept option '([\w.]+)'",
        text,
    )
    if unknown or (option and key):
        name = next(filter(None, unknown.groups())) if unknown else f"{key[1]}.{option[1]}"  # type: ignore[index]
        near = _nearest_key(name)
        return f"there is no config key {name!r}" + (f"; did you mean {near!r}?" if near else "")
    nested = re.search(
        r'Errors: - Parser key "(\w+)": (.*?)(?: - Expected a <class \'NoneType\'>)? Given value type:', text
    )
    if nested and key:
        text = f"{key[1]}.{nested[1]}: {nested[2]}"
    reasons = re.search(r"Errors: - (.*) Given value type: .* Given value: (.*)$", text)
    if reasons:
        several = [reason for reason in reasons[1].split(" - ") if "<class 'NoneType'>" not in reason]
        given = "" if "Namespace(" in reasons[2] else f", not {reasons[2]}"
        text = (f"{key[1]}: " if key else "") + " or ".join(several) + given
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace(". Got value: ", ", not ")
    return re.sub(r'^Parser key "([\w.]+)"', r"\1", text).replace("Expected a ", "expected ")


def _raised_in(error: BaseException) -> str:
    """Name of the module whose code raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def _value(rest: Any, name: str) -> str:
    value = next(rest, None)
    if value is None:
        raise UserError(f"{name} needs a value")
    return value


def _check_config(path: str) -> None:
    """Name the file where a config is no YAML mapping; jsonargparse only quotes its text."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"config {path} is not valid YAML{where}: {problem}") from error
    if not isinstance(settings, dict):
        raise UserError(f"config {path} holds no settings; expected lines of the form KEY: VALUE")


def _checkpoint_settings(path: str) -> dict[str, Any]:
    """The model's settings that a checkpoint was made with."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        # Read as a whole, which checks its sums: damage must show before a run is started from it.
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
        checkpoint["pytorch-lightning_version"], checkpoint["state_dict"], checkpoint["snell"]
        settings = {key: value for key, value in checkpoint["hyper_parameters"].items() if not key.startswith("_")}
        json.dumps(settings)
    except Exception as error:
        raise UserError(
            f"{path} is not a checkpoint of this package, or is damaged ({type(error).__name__})"
        ) from error
    # Comes from the data, and where to start from is what the checkpoint itself says.
    return {key: value for key, value in settings.items() if key not in ("num_classes", "adapter_file")}


def _adapter_settings(path: str) -> dict[str, Any]:
    """The settings that an adapter file was made with."""
    _, metadata = read_adapter(path)
    return {"backbone": metadata["backbone"], "adapter": metadata["config"]}


_SETTINGS_FROM = {"--ckpt_path": _checkpoint_settings, "--model.adapter_file": _adapter_settings}


def _nearest_key(key: str) -> str | None:
    """The valid key most like `key`."""
    groups = {
        "model": ImageClassifier,
        "model.adapter": SnellConfig,
        "model.optimizer": torch.optim.AdamW,
        "data": ImageDataModule,
        "trainer": Trainer,
        "checkpoint": AdapterCheckpoint,
        "monitor": SnellMonitor,
    }
    keys = {f"{group}.{name}" for group, cls in groups.items() for name in inspect.signature(cls).parameters}
    keys |= {*groups, "config", "seed_everything", "ckpt_path"}
    # A key that stands in the wrong group, or in none, is looked for by its last part.
    by_leaf = {name.rpartition(".")[2]: name for name in sorted(keys)}
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    leaf = difflib.get_close_matches(key.rpartition(".")[2], by_leaf, n=1, cutoff=0.6)
    return near[0] if near else by_leaf[leaf[0]] if leaf else None


def _is_about_the_run(record: logging.LogRecord) -> bool:
    """Whether a message of lightning's is neither an advertisement nor of interest to its developers alone."""
    message = record.getMessage()
    return not any(text in message for text in ("💡", "to estimate number of stepping batches", "TPU available: False"))


def _quieten() -> None:
    """Switch off what is not about the run: advertisements, and advice that does not apply."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_about_the_run)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
    # Frozen batch norms stay in evaluation mode on purpose.
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
