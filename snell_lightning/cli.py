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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from snell_lightning.adapters import UserError, read_adapter
from snell_lightning.help import COMMANDS, help_for
from snell_lightning.messages import LINKED, one_line
from snell_lightning.runs import own_adapter

if TYPE_CHECKING:
    from snell_lightning.lightning_cli import SnellCLI

_PACKAGE = Path(__file__).parent
# In a checkout the configs stand beside the package, in an installed wheel inside it.
SHIPPED_CONFIGS = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()),
    _PACKAGE / "configs",
)
_DEBUG = "SNELL_DEBUG"
_EVALUATE = ("validate", "test", "predict")
_SPLIT_KEYS = ("data.seed", "data.val_fraction", "data.test_fraction", "data.fixed_splits")
_ABSENT = object()
_HELP_ALL = "--help-all"


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
    if (text := help_for(arguments)) is not None:
        print(text)
        raise SystemExit(0)
    if run and not arguments:
        raise UserError(f"name a command: {', '.join(COMMANDS)}; --help says more")
    _quieten()
    arranged = arrange_arguments(arguments)
    if _HELP_ALL in arguments:
        arranged = [argument for argument in arguments[:1] if argument != _HELP_ALL] + ["--help"]
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

    The settings are those of the checkpoint or the adapter that `--ckpt_path` or `--model.adapter_file` names. What is
    to be evaluated may also be named as a run, by the config in its folder: then its adapter is taken.

    For example `fit --data.seed 4 --config vit.yaml` becomes `fit --config .../vit.yaml --data.seed 4`.

    Raises:
        UserError: A config is neither a file nor shipped, or it, the adapter or the checkpoint cannot be read, or there
            is nothing to evaluate.
    """
    command = next((argument for argument in arguments[:1] if not argument.startswith("-")), "")
    configs, values, given = _sort_out(arguments[1 if command else 0 :])
    contents = [_read_config(path) for path in configs]
    _refuse_linked(given, contents)
    named = {name: given[name] for name in _SETTINGS_FROM if given.get(name, "null") != "null"}
    evaluates = command in _EVALUATE and not any(
        value.startswith(("-h", "--help", "--print_config")) for value in values
    )
    if evaluates and not named:
        own = next((path for config in reversed(configs) if (path := own_adapter(config))), None)
        if own is not None:
            _tell(f"adapter: {own}, the run's own")
            named = {"--model.adapter_file": own}
            values += ["--model.adapter_file", own, "--ckpt_path", "null"]
    named = named or _named_in(contents)
    if evaluates and not named:
        raise UserError(
            f"{command} needs a tuned model: name one with --model.adapter_file FILE or --ckpt_path FILE, or a run "
            "with --config RUN/config.yaml"
        )
    layers = [part for path in configs for part in ("--config", path)]
    for name, path in named.items():
        if path in ("best", "last", "hpc"):
            continue
        settings = _SETTINGS_FROM[name](path)
        anew = command not in _EVALUATE and name == "--model.adapter_file"
        if anew:
            # How images are varied in training is not the adapter's to say.
            settings["data"].pop("augmentation", None)
        _compare(settings, given, path, anew)
        layers += ["--config", json.dumps(settings)]
    return [*([command] if command else []), *layers, *values]


def _sort_out(arguments: Sequence[str]) -> tuple[list[str], list[str], dict[str, str]]:
    """Paths of the configs, all other arguments as they are, and of these the values by option."""
    configs: list[str] = []
    values: list[str] = []
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c"):
            if not equals and not rest:
                raise UserError(f"{name} needs a value")
            configs.append(find_config(value if equals else rest.pop(0)))
            continue
        values.append(argument)
        if name.startswith("--"):
            if not equals and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
                values.append(value)
            elif not equals and name in _SETTINGS_FROM:
                raise UserError(f"{name} needs a value")
            given[name] = value
    return configs, values, given


def _refuse_linked(given: Mapping[str, str], contents: Sequence[Mapping[str, Any]]) -> None:
    """Raise where a key is given that follows from another one: jsonargparse ignores those in configs."""
    for key, source in LINKED.items():
        group, _, name = key.partition(".")
        in_config = any(isinstance(content.get(group), Mapping) and name in content[group] for content in contents)
        if in_config or f"--{key}" in given:
            raise UserError(f"{key} comes from {source}; leave it out")


def _named_in(contents: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The adapter and the checkpoint that configs name."""
    found: dict[str, str] = {}
    for content in contents:
        model = content.get("model")
        for name, value in {
            "--model.adapter_file": model.get("adapter_file") if isinstance(model, Mapping) else None,
            "--ckpt_path": content.get("ckpt_path"),
        }.items():
            if isinstance(value, str):
                found[name] = value
    return found


def _compare(settings: Mapping[str, Any], given: Mapping[str, str], path: str, anew: bool) -> None:
    """Say where values on the command line beat those of an adapter or a checkpoint.

    Args:
        settings: Those of the file.
        given: Values on the command line, by option.
        path: The file.
        anew: Whether training starts from it anew, perhaps on other images.

    Raises:
        UserError: Images would be split in another way, so that some are tested that were trained on.
    """
    # It brings lightning with it, which is slow to import.
    from snell_lightning.data.transforms import Normalization

    for option, text in given.items():
        key = option.removeprefix("--")
        ours: Any = settings
        for part in key.split("."):
            ours = ours.get("init_args", ours) if isinstance(ours, Mapping) and part not in ours else ours
            ours = ours.get(part, _ABSENT) if isinstance(ours, Mapping) else _ABSENT
        try:
            theirs = yaml.safe_load(text)
        except yaml.YAMLError:
            theirs = text
        if key == "data.normalization" and isinstance(theirs, str):
            fixed = Normalization.resolve(theirs, ours) if isinstance(ours, Mapping) else None
            theirs = theirs if fixed is None else {"mean": list(fixed.mean), "std": list(fixed.std)}
        if ours is _ABSENT or ours == theirs:
            continue
        if key in _SPLIT_KEYS and not anew:
            raise UserError(
                f"{path} was tuned with {key} {ours}; with {text} other images would be for testing, and it was tuned "
                f"on some of them: leave {key} out, or evaluate on a folder of other images with data.eval_split all"
            )
        _tell(f"{key}: {text}, in place of {ours} in {path}")


def _tell(line: str) -> None:
    """Print a line on stderr, in the first process alone."""
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    if next((rank for rank in ranks if rank is not None), "0") == "0":
        print(line, file=sys.stderr)


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


def _read_config(path: str) -> dict[str, Any]:
    """What a config says; where it is no YAML mapping its file is named, of which jsonargparse only quotes the text."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"config {path} is not valid YAML{where}: {problem}") from error
    if not isinstance(settings, dict):
        raise UserError(f"config {path} holds no settings; expected lines of the form KEY: VALUE")
    return settings


def _checkpoint_settings(path: str) -> dict[str, Any]:
    """The settings of model and data that a checkpoint was made with."""
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        # Read as a whole, which checks its sums: damage must show before a run is started from it.
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
        checkpoint["pytorch-lightning_version"], checkpoint["state_dict"]
        data = checkpoint["snell"].get("data", {})
        settings = {key: value for key, value in checkpoint["hyper_parameters"].items() if not key.startswith("_")}
        json.dumps([settings, data])
    except Exception as error:
        raise UserError(
            f"{path} is not a checkpoint of this package, or is damaged ({type(error).__name__})"
        ) from error
    # Comes from the data, and where to start from is what the checkpoint itself says.
    model = {key: value for key, value in settings.items() if key not in ("num_classes", "image_size", "adapter_file")}
    return {"model": model, "data": _data_settings(data)}


def _adapter_settings(path: str) -> dict[str, Any]:
    """The settings of model and data that an adapter file was made with."""
    _, metadata = read_adapter(path)
    model = {"backbone": metadata["backbone"], "adapter": metadata["config"]}
    model |= {key: metadata[key] for key in ("backbone_args", "pretrained") if key in metadata}
    return {"model": model, "data": _data_settings(metadata)}


def _data_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What `ImageDataModule.settings` said, as its arguments."""
    same = {key: saved[key] for key in ("classes", "image_size", "normalization", "augmentation") if key in saved}
    return {**same, **(saved.get("split") or {})}


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
