"""The command line: shipped configs, what beats what, and errors of one line.

    python -m snell_lightning {fit,validate,test,predict,memory} --config vit.yaml [--config MORE.yaml] [--KEY VALUE]

What is given later wins: built-in defaults, then configs from left to right, then the settings a checkpoint was made
with (where `--ckpt_path` names one), then values on the command line, wherever they stand.

Lightning takes seconds to import. So configs are looked up before that, and `lightning_cli.py` is imported after.
"""

import difflib
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from snell_lightning.adapters import UserError, read_adapter
from snell_lightning.messages import one_line

if TYPE_CHECKING:
    from snell_lightning.lightning_cli import SnellCLI

_PACKAGE = Path(__file__).parent
# In a checkout the configs stand beside the package, in an installed wheel inside it.
SHIPPED_CONFIGS = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()),
    _PACKAGE / "configs",
)
_DEBUG = "SNELL_DEBUG"


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


def make_cli(arguments: Sequence[str], run: bool = True) -> "SnellCLI":
    """Parse a command line and carry it out.

    Args:
        arguments: The command line without the program's name.
        run: False makes trainer, model and data without running them; `arguments` then starts with no command.
    """
    _quieten()
    arranged = arrange_arguments(arguments)
    from snell_lightning.lightning_cli import run_cli

    return run_cli(arranged, run)


def __getattr__(name: str) -> Any:
    # `from snell_lightning.cli import SnellCLI` holds for those who build on it.
    if name == "SnellCLI":
        from snell_lightning.lightning_cli import SnellCLI

        return SnellCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    return {key: value for key, value in settings.items() if key not in ("num_classes", "image_size", "adapter_file")}


def _adapter_settings(path: str) -> dict[str, Any]:
    """The settings that an adapter file was made with."""
    _, metadata = read_adapter(path)
    return {"backbone": metadata["backbone"], "adapter": metadata["config"]}


_SETTINGS_FROM = {"--ckpt_path": _checkpoint_settings, "--model.adapter_file": _adapter_settings}


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
