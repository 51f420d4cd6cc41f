"""The update on a GPU: a few launches where torch's operations need hundreds, and little beside the weight is moved.

One operation a file: `thresholds.py` for a whole model, `write.py` and `backward.py` for a layer; `entries.py` holds
what they share, `table.py` how a launch finds its updates, `operations.py` what torch sees of it. Written in Triton,
which comes with torch's builds for GPUs. Where it is missing, or cannot be used, torch's operations do the same.

Here is only what decides: nothing of Triton is loaded before it is needed.
"""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

# Kinds of devices that programs are written for, and types of matrices.
DEVICES = frozenset({"cuda", "xpu"})
_PLAIN = frozenset({Tensor, torch.nn.Parameter, FakeTensor})
TYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
KERNELS = frozenset({"distance", "linear"})
# The first compute capability of NVIDIA's devices that Triton supports.
_CAPABILITY = (8, 0)

_log = logging.getLogger(__name__)


def applies(*factors: Tensor) -> bool:
    """Whether this folder does the work for updates of these factors."""
    first = factors[0]
    if first.device.type not in DEVICES or first.dtype not in TYPES:
        return False
    # Factors that are spread over processes have no address of their own.
    same = all(type(each) in _PLAIN and each.dtype == first.dtype and each.device == first.device for each in factors)
    return same and all(each.is_contiguous() for each in factors) and usable(first.device)


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether Triton is there and serves this device; said once if not."""
    if os.environ.get("SNELL_COMPILE") == "0":
        return False
    reason = _why_not(device)
    if reason:
        _log.warning("the update is made by torch's operations on %s, which is slower: %s", device, reason)
    return reason is None


def _why_not(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _CAPABILITY:
            return f"its compute capability is {capability[0]}.{capability[1]}, and triton needs 8.0"
    try:
        from snell_lightning.adapters.update.triton.operations import attempt

        attempt(device)
    except Exception as error:
        # Whatever Triton lacks, a C compiler perhaps, training goes on without it.
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
    return None
