"""Names as the plain model has them, whatever it is wrapped in: files do not depend on whether a model was compiled."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# What torch.compile, FSDP and checkpoint wrappers put between a module and its children.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """The name of a parameter or module, without those of wrappers."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of what trains it in several processes or has compiled it."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
