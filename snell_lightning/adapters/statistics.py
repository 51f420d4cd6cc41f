"""Running statistics of normalisations: part of the frozen backbone, or trained and kept with what is trained.

In training mode a batch norm replaces its statistics little by little, whether its parameters are frozen or not. Those
of a frozen one must stay: they are in no adapter file. Those of a trained one, as in some heads, move and are kept.
"""

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def freeze_statistics(model: nn.Module) -> None:
    """Keep normalisations whose parameters are frozen in evaluation mode, whoever calls `train()`.

    Called again, it does the same for modules that were put in since.
    """
    for module in model.modules():
        if _has_statistics(module) and not _is_trained(module):
            # On the instance, so that its class stays what it is; a copy's is bound to the copy.
            module.train = partial(_train, module)  # type: ignore[method-assign]
            module.training = False


def release_statistics(model: nn.Module) -> None:
    """Undo `freeze_statistics`."""
    for module in model.modules():
        if isinstance(own := vars(module).get("train"), partial) and own.func is _train:
            del module.train
            module.training = model.training


def trained_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Statistics that training moves, by their name in the model: those of normalisations with trained parameters."""
    for name, module in model.named_modules():
        if _has_statistics(module) and _is_trained(module):
            for local in _STATISTICS:
                statistic = module._buffers.get(local)
                if statistic is not None:
                    yield (f"{name}.{local}" if name else local), statistic


def _has_statistics(module: nn.Module) -> bool:
    return any(module._buffers.get(local) is not None for local in _STATISTICS)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter is not None and parameter.requires_grad for parameter in module._parameters.values())


def _train(module: nn.Module, mode: bool = True) -> nn.Module:
    type(module).train(module, mode)
    module.training = False
    return module
