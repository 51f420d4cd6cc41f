"""How long the threads of OpenMP spin while they wait for work, before they sleep.

Left to itself, GNU's OpenMP lets them spin between two operations of torch for so long that they seldom sleep. Of two
jobs on one machine each then waits for processors on which the other's threads spin. Asleep at once, a job alone has to
wake them at every operation. In between, both are near their best (`python -m benchmarks.sharing`).

Read when torch is loaded, so it has to be said before.
"""

import os
from collections.abc import MutableMapping

# Turns of the loop: a fraction of a millisecond, and a fifteenth of what is usual.
_SPINS = "20000"
_SAID_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def spin_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads sleep soon, unless the user has said how they wait."""
    if not any(name in environment for name in _SAID_BY_USER):
        environment["GOMP_SPINCOUNT"] = _SPINS
