"""How the threads of OpenMP wait for work. Asleep, they leave the processor to other processes on the machine.

Left to itself, GNU's OpenMP lets them spin between two operations of torch. A job alone gains nothing by it; of two
jobs on one machine, each then waits for processors on which the other's threads spin (`benchmarks/sharing.py`).

Read when torch is loaded, so it has to be said before.
"""

import os
from collections.abc import MutableMapping

_PASSIVE = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}


def wait_asleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has said how they wait."""
    if not _PASSIVE.keys() & environment.keys():
        environment.update(_PASSIVE)
