"""What a user is told about a mistake: one line that names what was given, what was expected and what to do."""

import difflib
import inspect
import os
import re
import traceback

import torch

from snell_lightning.adapters import SnellConfig, UserError

LINKED = {
    "model.num_classes": "the number of class folders that the data have",
    "model.image_size": "data.image_size",
    "model.val_name": "data.protocol",
    "data.backbone": "model.backbone",
}
"""Keys that are not the user's to give, and what they follow from."""


class ConfigError(UserError):
    """What jsonargparse says about a command line or a config, in its own words."""


def one_line(error: BaseException) -> str | None:
    """What to tell a user about an error, on one line; None where it is no user's mistake but a fault of ours."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the device ran out of memory; lower data.batch_size and raise trainer.accumulate_grad_batches by the "
            "same factor"
        )
    if isinstance(error, OSError):
        reason = error.strerror or " ".join(str(error).split())
        return f"{reason}: {os.fsdecode(error.filename)}" if error.filename else reason
    if isinstance(error, ConfigError) or type(error).__module__.startswith("jsonargparse"):
        return explain(str(error))
    if isinstance(error, ValueError) and str(error).startswith("Does not validate against"):
        # What jsonargparse makes of an error that a settings class raised.
        return explain(str(error))
    if isinstance(error, RuntimeError) and (taken := re.search(r"expected (\S+) to NOT exist", str(error))):
        return (
            f"another run has saved {taken[1]}; give this one a folder of its own, such as trainer.logger.version NAME"
        )
    if isinstance(error, UserError) or _is_lightnings(error):
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


def _is_lightnings(error: BaseException) -> bool:
    """Whether lightning refused a setting, such as an unknown accelerator; it has plain value errors for that too."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return isinstance(error, MisconfigurationException) or (
        isinstance(error, ValueError) and _raised_in(error).startswith("lightning.")
    )


def _raised_in(error: BaseException) -> str:
    """Name of the module whose code raised an error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")) if frames else ""


def _nearest_key(key: str) -> str | None:
    """The valid key most like `key`."""
    from lightning.pytorch import Trainer

    from snell_lightning.callbacks import AdapterCheckpoint, ClassReport, SnellMonitor
    from snell_lightning.data import ImageDataModule
    from snell_lightning.module import ImageClassifier

    groups = {
        "model": ImageClassifier,
        "model.adapter": SnellConfig,
        "model.optimizer": torch.optim.AdamW,
        "data": ImageDataModule,
        "trainer": Trainer,
        "checkpoint": AdapterCheckpoint,
        "monitor": SnellMonitor,
        "report": ClassReport,
    }
    keys = {f"{group}.{name}" for group, cls in groups.items() for name in inspect.signature(cls).parameters}
    keys |= {*groups, "config", "seed_everything", "ckpt_path"}
    keys -= LINKED.keys()
    # A key that stands in the wrong group, or in none, is looked for by its last part.
    by_leaf = {name.rpartition(".")[2]: name for name in sorted(keys)}
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    leaf = difflib.get_close_matches(key.rpartition(".")[2], by_leaf, n=1, cutoff=0.6)
    return near[0] if near else by_leaf[leaf[0]] if leaf else None
