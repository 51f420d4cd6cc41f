"""The command line: shipped configs, what beats what, and errors of one line.

    python -m snell_lightning fit --config vit.yaml [--config MORE.yaml ...] [--KEY VALUE ...]

What is given later wins: built-in defaults, then configs from left to right, then the settings a checkpoint was made
with (where `--ckpt_path` names one), then values on the command line, wherever they stand.

Lightning takes seconds to import. So configs are looked up before that, and `lightning_cli.py` is imported after.
"""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from snell_lightning.adapters import UserError
from snell_lightning.arguments import (
    SHIPPED_CONFIGS,
    arrange_arguments,
    continue_run,
    find_config,
    read_pipes,
    slurm_job,
)
from snell_lightning.help import COMMANDS, help_for
from snell_lightning.inference.commands import is_own
from snell_lightning.inference.commands import run as run_own
from snell_lightning.messages import one_line
from snell_lightning.peers import is_loss, loss, own_failure, rank

if TYPE_CHECKING:
    from snell_lightning.lightning_cli import SnellCLI

__all__ = ["SHIPPED_CONFIGS", "SnellCLI", "arrange_arguments", "find_config", "main", "make_cli"]
_DEBUG = "SNELL_DEBUG"
_HELP_ALL = "--help-all"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends it with one line on stderr and status 1.

    Args:
        arguments: The command line without the program's name; by default that of this process.
    """
    own = arguments is None
    try:
        arguments = read_pipes(sys.argv[1:] if arguments is None else arguments)
        if own:
            # Processes that lightning starts run this process's command line again.
            sys.argv[1:] = arguments
        make_cli(arguments)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        debug = bool(os.environ.get(_DEBUG))
        line = one_line(error)
        if is_loss(error):
            line = loss(error)
            if line is None and not debug:
                raise SystemExit(1) from None
        else:
            own_failure(line or f"{type(error).__name__}: {' '.join(str(error).split())}")
        if line is None or debug:
            raise
        number = rank()
        where = f" [process {number}]" if number is not None else ""
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
    if run and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise UserError(f"there is no command {arguments[0]!r}; expected one of {', '.join(COMMANDS)}")
    _quieten()
    if run and arguments[0] == "check-data":
        # Lightning's verbs are names of methods.
        arguments = ["check_data", *arguments[1:]]
    if run and is_own(arguments):
        run_own(arguments)
        raise SystemExit(0)
    facts = {"slurm_job": slurm_job(), "arguments": list(arguments)}
    arguments, folder = continue_run(arguments)
    arranged = arrange_arguments(arguments)
    if _HELP_ALL in arguments:
        arranged = [argument for argument in arguments[:1] if argument != _HELP_ALL] + ["--help"]
    from snell_lightning.lightning_cli import run_cli

    return run_cli(arranged, run, folder, facts)


def __getattr__(name: str) -> Any:
    # `from snell_lightning.cli import SnellCLI` holds for those who build on it.
    if name == "SnellCLI":
        from snell_lightning.lightning_cli import SnellCLI

        return SnellCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _is_about_the_run(record: logging.LogRecord) -> bool:
    """Whether a message of lightning's is neither an advertisement nor of interest to its developers alone."""
    message = record.getMessage()
    return not any(text in message for text in ("💡", "to estimate number of stepping batches", "TPU available: False"))


def _in_a_thread(error: threading.ExceptHookArgs) -> None:
    """What TensorBoard's writer fails of, on a full disk for one, it raises in the main thread as well."""
    if not type(error.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(error)


def _quieten() -> None:
    """Switch off what is not about the run: advertisements, and advice that does not apply."""
    threading.excepthook = _in_a_thread
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_about_the_run)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
    # Frozen batch norms stay in evaluation mode on purpose.
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
