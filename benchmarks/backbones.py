"""What the default adapts in every module of timm: layers, their share of the weights, and how they are divided.

    python -m benchmarks.backbones

takes of each module a small model with random weights, as the table in docs/backbones.md names it, injects adapters and
writes the rest of the table anew. `pytest -m backbones` tests each of these models: its row of the table; that a
vanishing update leaves the output as it is; that all settings of `recompute` give the same gradients, to every adapter;
that a reloaded and a merged model give the same logits; and that each update's rows are those of one of the model's own
projections.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

from snell_lightning.adapters import SnellConfig, SnellLinear, UserError, heads, inject
from snell_lightning.backbones import create_backbone, require_image_size
from snell_lightning.backbones.sizes import ImageSize

TABLE = Path(__file__).resolve().parent.parent / "docs" / "backbones.md"

# What a layer is called inside a module that has the name that matters.
_PARTS = ("c", "conv", "linear", "f")


class Row(NamedTuple):
    """A row of the table, in its words.

    Attributes:
        module: timm's.
        model: Its name.
        arguments: Of `timm.create_model`, as JSON.
        pixels: Height and width of the images it is tested on.
        sizes: Which other ones it takes by `image_size` alone: `squares, rectangles`, `squares` or `its own`.
        layers: How many are adapted, or why none is.
        share: Of the weights that lie in these, the head's left out.
        divided: How many of these hold several projections, and how many each.
    """

    module: str
    model: str
    arguments: str
    pixels: str
    sizes: str = ""
    layers: str = ""
    share: str = ""
    divided: str = ""

    def create(self) -> nn.Module:
        """The model with random weights, the same every time, and three classes."""
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(self.model, num_classes=3, **json.loads(self.arguments or "{}"))
        return model.eval()

    def other_sizes(self) -> dict[str, tuple[int, int]]:
        """A larger square, and a rectangle."""
        side = int(self.pixels)
        return {"squares": (side * 3 // 2, side * 3 // 2), "rectangles": (side, side * 3 // 2)}

    def resized(self, size: ImageSize) -> nn.Module:
        """The model for images of that size, as a user asks for it.

        Raises:
            UserError: It takes none of that size.
        """
        arguments = {key: value for key, value in json.loads(self.arguments or "{}").items() if key != "img_size"}
        model = create_backbone(self.model, 3, False, size, **arguments).eval()
        require_image_size(self.model, model, size)
        return model

    def described(self, model: nn.Module, names: Iterable[str]) -> "Row":
        """The row of this model, adapted in these layers."""
        layers = {name: layer for name in names if isinstance(layer := model.get_submodule(name), SnellLinear)}
        weights = sum(layer.weight.numel() for layer in layers.values())
        apart = {id(parameter) for head in heads(model).values() for parameter in head.parameters()}
        apart |= {id(parameter) for layer in layers.values() for parameter in layer.deltas.parameters()}
        total = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in apart)
        divided: Counter[str] = Counter()
        for name, layer in layers.items():
            if len(layer.deltas) > 1:
                # `attn.qkv`, or the numbered part's name where there is nothing else to tell.
                last = next(part for part in reversed(name.split(".")) if part not in _PARTS and not part.isdigit())
                divided[f"{last} in {len(layer.deltas)}"] += 1
        return self._replace(
            layers=str(len(layers)),
            share=f"{weights / total:.1%}",
            divided=", ".join(f"{count} {what}" for what, count in divided.items()) or "none",
        )

    def line(self) -> str:
        """The row as it stands in the table."""
        return f"| {' | '.join(self)} |"


def read_table() -> list[Row]:
    """The rows of the table."""
    text = TABLE.read_text()
    lines = [line for line in text[text.index("| module |") :].splitlines() if line.startswith("| ")]
    return [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in lines[1:]]


def describe(row: Row) -> Row:
    """The row of a model, made anew."""
    taken = []
    for name, size in row.other_sizes().items():
        with contextlib.suppress(UserError):
            row.resized(size)
            taken.append(name)
    row, model = row._replace(sizes=", ".join(taken) or "its own"), row.create()
    try:
        return row.described(model, inject(model, SnellConfig(rank=2)))
    except UserError as error:
        return row._replace(layers=f"refused: {str(error).split(';')[0]}", share="", divided="")


def run() -> dict[str, Any]:
    """Write the table and print it."""
    text = TABLE.read_text()
    for row in read_table():
        found = describe(row)
        text = text.replace(f"{row.line()}\n", f"{found.line()}\n")
        print(found.line(), flush=True)
    TABLE.write_text(text)
    return {"rows": len(read_table())}


if __name__ == "__main__":
    run()
