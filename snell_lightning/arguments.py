"""The command line before it is parsed: which configs, what beats what, and which run goes on.

Lightning takes seconds to import, and here it is not needed: a config that does not exist is told of at once.
"""

import difflib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from snell_lightning.adapters import UserError, read_adapter
from snell_lightning.checkpoints import read_checkpoint
from snell_lightning.messages import LINKED
from snell_lightning.peers import rank
from snell_lightning.runs import continuable, own_adapter, root_of, short, unfinished

_PACKAGE = Path(__file__).parent
# In a checkout the configs stand beside the package, in an installed wheel inside it.
SHIPPED_CONFIGS = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()),
    _PACKAGE / "configs",
)
_EVALUATE = ("validate", "test", "predict")
_SPLIT_KEYS = ("data.seed", "data.val_fraction", "data.test_fraction", "data.fixed_splits")
_CONFIG = ("--config", "-c")
# Top-level keys of a config that are there for its anchors alone, such as `x-rate: &rate 1e-3`.
_PRIVATE = "x-"
_RESUME = "--resume"
_ABSENT = object()


class _Loader(yaml.SafeLoader):
    """YAML as jsonargparse reads it: 1e-3 is a number too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+0123456789."),
)


def read_pipes(arguments: Sequence[str]) -> list[str]:
    """The same command line, with each config in it whose file can be read only once: `-`, or a pipe as in `<(...)`."""
    read: list[str] = []
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        own = option in _CONFIG and equals == "="
        name = value if own else argument if place and arguments[place - 1] in _CONFIG else None
        if name is not None and _is_pipe(name):
            text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
            content = json.dumps(_settings_in(text, f"config {name}"), default=str)
            argument = f"{option}={content}" if own else content
        read.append(argument)
    return read


def continue_run(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Find the run that `--resume` names, and the checkpoint to go on from.

    `auto` is the newest whole checkpoint of the unfinished runs where runs go, or a fresh start; a folder is the run in
    it. A job that SLURM has queued again goes on with its own run.

    Args:
        arguments: The command line without the program's name.

    Returns:
        The command line with that checkpoint in the place of `--resume`, and the run's folder; None for a new run.

    Raises:
        UserError: That run cannot go on, or the command line says more than one thing about it.
    """
    command = arguments[0] if arguments else ""
    configs, _, given = _sort_out(arguments[1:])
    which = given.get(_RESUME)
    job = slurm_job()
    again = command == "fit" and job is not None and int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
    if which is None and not again:
        return list(arguments), None
    if command != "fit":
        raise UserError(f"{_RESUME} goes with fit, not with {command or 'no command'}; to evaluate, name a checkpoint")
    if which is not None and "--ckpt_path" in given:
        raise UserError(f"{_RESUME} says where to go on from, and so does --ckpt_path; leave one of them out")
    root = root_of(_of_trainer([_read_config(path) for path in configs], given))
    rest = _without(arguments, _RESUME)
    if which is None:
        found = unfinished(root, _is_whole, slurm_job=job, arguments=list(arguments))
    elif which == "auto":
        found = unfinished(root, _is_whole)
    else:
        folder = Path(which).absolute()
        found = folder, continuable(folder, _is_whole)
    if found is None:
        tell(f"resume: no run in {short(root)} is unfinished and has a whole checkpoint; a fresh start")
        return rest, None
    folder, checkpoint = found
    tell(f"resume: the run in {short(folder)} goes on from {short(checkpoint)}")
    return [*rest, "--ckpt_path", str(checkpoint)], folder


def slurm_job() -> str | None:
    """The number of the SLURM job that this process belongs to; of an array's job with the task's."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


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
            tell(f"adapter: {own}, the run's own")
            named = {"--model.adapter_file": own}
            values += ["--model.adapter_file", own, "--ckpt_path", "null"]
    named = named or _named_in(contents)
    if evaluates and not named:
        raise UserError(
            f"{command} needs a tuned model: name one with --model.adapter_file FILE or --ckpt_path FILE, or a run "
            "with --config RUN/config.yaml"
        )
    layers: list[str] = []
    for path, content in zip(configs, contents, strict=True):
        public = {key: value for key, value in content.items() if not str(key).startswith(_PRIVATE)}
        layers += ["--config", path if public.keys() == content.keys() else json.dumps(public, default=str)]
    for name, path in named.items():
        if path in ("best", "last", "hpc"):
            continue
        settings = _SETTINGS_FROM[name](path)
        anew = command not in _EVALUATE and name == "--model.adapter_file"
        if anew:
            # How images are varied in training is not the adapter's to say.
            settings["data"].pop("augmentation", None)
        _compare(settings, given, path, anew)
        _tell_beaten(settings, contents, given, path)
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
        if name in _CONFIG:
            if not equals and not rest:
                raise UserError(f"{name} needs a value")
            configs.append(find_config(value if equals else rest.pop(0)))
            continue
        values.append(argument)
        if name.startswith("--"):
            if not equals and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
                values.append(value)
            elif not equals and name in (*_SETTINGS_FROM, _RESUME):
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
            theirs = yaml.load(text, _Loader)
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
        tell(f"{key}: {text}, in place of {ours} in {path}")


def _tell_beaten(
    settings: Mapping[str, Any], contents: Sequence[Mapping[str, Any]], given: Mapping[str, str], path: str
) -> None:
    """Say in one line where values of configs give way to those of an adapter or a checkpoint."""
    from snell_lightning.data.transforms import Normalization

    said: dict[str, Any] = {}
    for content in contents:
        said |= {key: value for key, value in _leaves(content) if key.startswith(("model.", "data."))}
    held = dict(_leaves(settings))
    fixed = settings["data"].get("normalization")
    if isinstance(fixed, Mapping):
        held = {key: value for key, value in held.items() if not key.startswith("data.normalization.")}
        held["data.normalization"] = fixed
        if isinstance(name := said.get("data.normalization"), str):
            resolved = Normalization.resolve(name, fixed)
            said["data.normalization"] = {"mean": list(resolved.mean), "std": list(resolved.std)}
    beaten = [
        f"{key} {held[key]} (not {value})"
        for key, value in said.items()
        if value is not None and key in held and held[key] != value and f"--{key}" not in given
    ]
    if beaten:
        tell(f"{path} was made with {', '.join(beaten)}; its values hold, unless given on the command line")


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys in full and values of nested settings; of classes the arguments count as the class's own keys."""
    for key, value in settings.items():
        name = prefix if key == "init_args" else f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, name)
        else:
            yield name, value


def tell(line: str) -> None:
    """Print a line on stderr, in the first process alone."""
    if not rank():
        print(line, file=sys.stderr)


def find_config(name: str) -> str:
    """The path of a config: the file of that name, or else the shipped config. Settings in JSON stay as they are.

    Raises:
        UserError: There is neither.
    """
    if name.startswith("{") or Path(name).is_file():
        return name
    if (SHIPPED_CONFIGS / name).is_file():
        return str(SHIPPED_CONFIGS / name)
    shipped = sorted(str(path.relative_to(SHIPPED_CONFIGS)) for path in SHIPPED_CONFIGS.rglob("*.yaml"))
    near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped)}"
    raise UserError(f"there is no config file {name!r}, neither here nor among the shipped ones; {hint}")


def _is_pipe(name: str) -> bool:
    path = Path(name)
    return name == "-" or (not name.startswith("{") and path.exists() and not path.is_file() and not path.is_dir())


def _read_config(config: str) -> dict[str, Any]:
    """What a config says; where it is no YAML mapping its file is named, of which jsonargparse only quotes the text."""
    if config.startswith("{"):
        return _settings_in(config, "the config on the command line")
    try:
        return _settings_in(Path(config).read_text(encoding="utf-8"), f"config {config}")
    except UnicodeDecodeError as error:
        raise UserError(f"config {config} is not valid YAML: {' '.join(str(error).split())}") from error


def _settings_in(text: str, source: str) -> dict[str, Any]:
    try:
        settings = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{source} is not valid YAML{where}: {problem}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{source} holds no settings; expected lines of the form KEY: VALUE")
    return settings


def _of_trainer(contents: Sequence[Mapping[str, Any]], given: Mapping[str, str]) -> dict[str, Any]:
    """What configs and values say of where runs go, as `root_of` takes it."""
    trainer: dict[str, Any] = {}
    for content in contents:
        said = content.get("trainer")
        if isinstance(said, Mapping):
            trainer |= {key: said[key] for key in ("default_root_dir", "logger") if key in said}
    logger = trainer.get("logger")
    logger = dict(logger) if isinstance(logger, Mapping) else {}
    for key in ("save_dir", "name"):
        for option in (f"--trainer.logger.{key}", f"--trainer.logger.init_args.{key}"):
            if option in given:
                logger.setdefault("init_args", {})
                logger["init_args"] = {**logger["init_args"], key: given[option]}
    if "--trainer.default_root_dir" in given:
        trainer["default_root_dir"] = given["--trainer.default_root_dir"]
    return {**trainer, "logger": logger}


def _without(arguments: Sequence[str], option: str) -> list[str]:
    """A command line without an option and its value."""
    rest: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument != option and not argument.startswith(f"{option}="):
            rest.append(argument)
        skip = argument == option
    return rest


def _is_whole(path: Path) -> bool:
    try:
        _checkpoint_settings(str(path))
    except (UserError, OSError) as error:
        tell(f"resume: {error}; an older one is looked for")
        return False
    return True


def _checkpoint_settings(path: str) -> dict[str, Any]:
    """The settings of model and data that a checkpoint was made with."""
    try:
        checkpoint = read_checkpoint(path)
        checkpoint["pytorch-lightning_version"], checkpoint["state_dict"]
        data = checkpoint["snell"].get("data", {})
        settings = {key: value for key, value in checkpoint["hyper_parameters"].items() if not key.startswith("_")}
        json.dumps([settings, data])
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(f"{path} is not a checkpoint of this package ({type(error).__name__})") from error
    model = {key: value for key, value in settings.items() if key not in _NOT_KEPT}
    return {"model": model, "data": _data_settings(data)}


# Of a model's settings: what comes from the data, and where training started from.
_NOT_KEPT = ("num_classes", "image_size", "val_name", "adapter_file")


def _adapter_settings(path: str) -> dict[str, Any]:
    """The settings of model and data that an adapter file was made with."""
    _, metadata = read_adapter(path)
    model = {"backbone": metadata["backbone"], "adapter": metadata["config"]}
    model |= {key: metadata[key] for key in ("backbone_args", "pretrained", "weights") if key in metadata}
    return {"model": model, "data": _data_settings(metadata)}


def _data_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """What `ImageDataModule.settings` said, as its arguments."""
    same = {
        key: saved[key]
        for key in ("classes", "image_size", "normalization", "augmentation", "crop_pct", "protocol")
        if key in saved
    }
    return {**same, **(saved.get("split") or {})}


_SETTINGS_FROM = {"--ckpt_path": _checkpoint_settings, "--model.adapter_file": _adapter_settings}
