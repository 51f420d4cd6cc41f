"""The learning rate over a run: a linear warm-up, then a cosine."""

import math
from collections.abc import Callable

# Adam's first steps go by signs and all in step; a pretrained backbone can collapse in them if the rate rises faster.
_FEWEST = 20


def long_enough(warmup: float, steps: int) -> float:
    """A warm-up's fraction of a run: as it is given, but at least 20 steps, or half of a shorter run; 0 stays 0.

    For example 0.1 stays 0.1 from 200 steps on, and is 0.2 with 100 steps and 0.5 with 10.
    """
    return max(warmup, min(_FEWEST / steps, 0.5)) if warmup and steps else warmup


def warmup_cosine(steps: int, warmup: float, start: float, end: float) -> Callable[[int], float]:
    """The learning rate's factor at each step: linear from `start` to 1, then half a cosine down to `end`.

    For example 10 steps with `warmup=0.2`, `start=0`, `end=0` give 0, 0.5, 1, then fall to 0 at step 10. A `start` or
    `end` above 1 counts as 1.
    """
    rising = round(warmup * steps)
    start, end = min(start, 1.0), min(end, 1.0)

    def factor(step: int) -> float:
        if step < rising:
            return start + (1 - start) * step / rising
        progress = min(1.0, (step - rising) / max(1, steps - rising))
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
