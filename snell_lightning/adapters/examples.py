"""What a model may be called with, where nobody says so."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from snell_lightning.adapters.finding import Layer, ancestors

# Pixels that a model is tried on after those that it names.
_USUAL = (224, 256, 384, 192, 128, 96, 64, 448, 512)


def attempts(
    model: nn.Module, layers: Mapping[str, Layer], found: Mapping[str, Any], example: Any
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Parts of the model and what to call them with: the whole on images, then what lies around layers not seen yet."""
    if example is not None:
        yield "", example if isinstance(example, tuple) else (example,)
        return
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for image in dict.fromkeys(_image_shapes(model)):
        yield "", (torch.empty(1, *image, dtype=dtype),)
    # Of a language model of Hugging Face's, tokens.
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping) and "input_ids" in dummy:
        yield "", (dummy["input_ids"],)
    tried = set()
    for name in found:
        for around in reversed(["", *ancestors(name)]):
            # What its first layer takes, the module may take as well.
            first = next(other for other in layers if around in ["", *ancestors(other)])
            width = layers[first].weight.shape[1]
            for shape in ((1, 16, width), (1, width, 4, 4), (1, 4, 4, width)):
                if found[name] is None and (around, shape) not in tried:
                    tried.add((around, shape))
                    yield around, (torch.empty(shape, dtype=dtype),)


def _image_shapes(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Images that the model may take, `(channels, height, width)`: of the sizes that it names, then of usual ones."""
    known = getattr(model, "pretrained_cfg", None) or {}
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if not known and first is None:
        return
    channels = known.get("input_size", (3 if first is None else first.in_channels,))[0]
    sizes = [
        next((size for module in model.modules() if (size := getattr(module, "img_size", None)) is not None), None)
    ]
    sizes += [known.get("input_size"), getattr(getattr(model, "config", None), "image_size", None), *_USUAL]
    for size in sizes:
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
            yield channels, height, width
