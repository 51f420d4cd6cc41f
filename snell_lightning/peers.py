"""Which of several processes failed first, and why.

When a process ends, the others learn no more than that a connection broke, in an error that looks like their own. So
a process that fails leaves word in the store that all of them share, and one that has lost a connection looks there. A
process that was killed leaves no word: then those that are left call the roll, and whoever does not answer is named.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import distributed

_FIRST, _HOST, _HERE = "snell/first", "snell/host/{}", "snell/here/{}"
# Seconds that the roll takes: all of those that are left have noticed by then.
_ROLL = 2.0
# Seconds after which the store is given up: it may have been on the machine that is gone.
_PATIENCE = 5.0
# What errors of a lost connection say that have no type of their own.
_LOST = re.compile(r"\bgloo\b|\bnccl\b|connection (closed|reset) by peer|timed out waiting", re.IGNORECASE)


def introduce() -> None:
    """Tell the other processes on which machine this one is."""
    if _have_met():
        _store().set(_HOST.format(distributed.get_rank()), socket.gethostname())


def rank(environment: Mapping[str, str] = os.environ) -> int | None:
    """This process's number among all; None where there is no other."""
    if _have_met():
        return distributed.get_rank()
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if name in environment:
            return int(environment[name])
    return None


def is_loss(error: BaseException) -> bool:
    """Whether an error means that another process cannot be reached, and so is none of this one's own."""
    if not _have_met():
        return False
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def own_failure(line: str) -> None:
    """Leave word of why this process ends, for the others and for torchrun.

    Args:
        line: What happened.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun's summary names the process that failed first, with this text.
        said = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as stream:
            json.dump({"message": said}, stream)
    if _have_met():
        here = f"process {distributed.get_rank()} on {socket.gethostname()}"
        _ask(lambda: _store().compare_set(_FIRST, "", f"{here}: {line}"))


def loss(error: BaseException) -> str | None:
    """What to say when another process cannot be reached.

    Returns:
        A line that names it and what it said last; None where another process says it.
    """
    # What gloo says stands between the place in its code and advice to programmers.
    own = re.sub(r"^\[/\S+\] |\. This is typically.*", "", " ".join(str(error).split()))
    found = _ask(_call_the_roll)
    if found is None:
        return f"process 0, or the machine that it ran on, cannot be reached any more ({own}); all processes end"
    first, gone, present = found
    if distributed.get_rank() != min(present):
        return None
    if first:
        return f"{first} (it failed first, and so all processes end)"
    if gone:
        return f"no answer from {' and '.join(gone)}: killed, or cut off from the network ({own}); all processes end"
    return f"a connection between processes broke ({own}); all of them are there, and end"


def _have_met() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _call_the_roll() -> tuple[str, list[str], list[int]]:
    """What the process that failed first said, those that are gone, and the numbers of those that are there."""
    store, everybody = _store(), range(distributed.get_world_size())
    store.set(_HERE.format(distributed.get_rank()), "")
    time.sleep(_ROLL)
    present = [each for each in everybody if store.check([_HERE.format(each)])]
    gone = [each for each in everybody if each not in present]
    hosts = {each: _read(store, _HOST.format(each)) for each in gone}
    named = [f"process {each} on {host}" if host else f"process {each}" for each, host in hosts.items()]
    return _read(store, _FIRST), named, present


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _ask(question: Callable[[], Any]) -> Any:
    """What the store answers; None where it does not, in time."""
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception:  # Whatever it is, there is no store to ask any more.
            return

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return answers[0] if answers else None


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()
