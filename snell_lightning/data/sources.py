"""Every source of images, by the name that `data.source` takes."""

from collections.abc import Mapping
from functools import partial

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.digits import digits
from snell_lightning.data.folder import folder
from snell_lightning.data.hugging_face import hugging_face
from snell_lightning.data.lists import few_shot, fgvc, vtab
from snell_lightning.data.shards import webdataset
from snell_lightning.data.splits import Source
from snell_lightning.data.table import table
from snell_lightning.data.torchvision_sets import torchvision_set
from snell_lightning.data.transforms import require_choice

SOURCES: dict[str, Source] = {
    "digits": digits,
    "folder": folder,
    "table": table,
    "vtab": vtab,
    "fgvc": fgvc,
    "few_shot": few_shot,
    "webdataset": webdataset,
}
"""Those that have no set's name behind a colon."""
_NAMED = ("torchvision", "datasets")


def source_of(name: str, columns: Mapping[str, str] | None, download: bool) -> Source:
    """The source that a name stands for.

    Args:
        name: One of `SOURCES`, `torchvision:NAME`, or `datasets` with or without a name.
        columns: Names of columns, for the sources that have some.
        download: Whether to fetch a set of torchvision's.

    Raises:
        UserError: There is no such source, or it has no columns or nothing to download.
    """
    kind, _, set_name = name.partition(":")
    if kind not in _NAMED:
        require_choice("source", name, (*SOURCES, *(f"{each}:NAME" for each in _NAMED)))
    if columns is not None and kind not in ("table", "datasets"):
        raise UserError(f"data.columns is for data.source table or datasets, not {name}")
    if download and kind != "torchvision":
        raise UserError(f"data.download is for data.source torchvision:NAME, not {name}")
    if kind == "torchvision":
        return partial(torchvision_set, set_name, download)
    if kind == "datasets":
        return partial(hugging_face, set_name, columns=columns)
    return SOURCES[name] if columns is None else partial(table, columns=columns)
