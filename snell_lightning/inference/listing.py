"""Which images are to be classified: folders with all below them, files, and patterns such as `photos/**/*.jpg`."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from snell_lightning.adapters.errors import UserError
from snell_lightning.data.listing import Listing


def list_images(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths of images, each once, in the order they are given in; those of a folder sorted.

    Args:
        given: Folders, files, and patterns as `glob` has them. A file that is named itself counts whatever its ending.

    Returns:
        The paths, and what was left out, in a line for each reason.

    Raises:
        UserError: There is nothing of a name, or not one image in all of it.
    """
    paths: dict[str, None] = {}
    notes: list[str] = []
    for name in given:
        found = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not found:
            raise UserError(f"there is no file, no folder and no match for --images {name}")
        folders = [Path(path) for path in found if os.path.isdir(path)]
        listing = Listing(folders)
        below = {str(folder): images for folder, images in listing.images({str(f): [f] for f in folders}).items()}
        notes += listing.notes()
        for path in found:
            paths |= dict.fromkeys(below[str(Path(path))] if os.path.isdir(path) else [path])
    if not paths:
        raise UserError(f"there is no image in {', '.join(given)}" + (f"; {'; '.join(notes)}" if notes else ""))
    return list(paths), notes
