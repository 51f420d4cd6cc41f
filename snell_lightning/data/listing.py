"""Which image files lie below class folders: each once, and what is left out by the way.

Left out are hidden files and folders, folders that systems and storage boxes make for themselves, files that no
installed reader opens, and links to what is listed anyway: `ln -s .. ant/up` would otherwise make every image one of
ants.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from snell_lightning.data.images import readable_endings

# Thumbnails and waste of Synology and QNAP boxes, macOS archives, Windows and Linux file systems.
_JUNK = frozenset(
    {"@eadir", "@recycle", "#recycle", "$recycle.bin", "__macosx", "lost+found", "system volume information"}
)
_HEIF = frozenset({".heic", ".heif", ".hif"})


def folders_in(path: Path) -> list[Path]:
    """The folders directly in a folder, sorted, without hidden ones and junk."""
    with os.scandir(path) as entries:
        return sorted(Path(entry.path) for entry in entries if not is_junk(entry.name) and _is_folder(entry))


def is_junk(name: str) -> bool:
    """Whether a folder of that name is hidden or made by a system for itself."""
    return name.startswith(".") or name.lower() in _JUNK


def has_images(path: Path) -> bool:
    """Whether an image lies directly in a folder."""
    with os.scandir(path) as entries:
        return any(_is_image(entry.name) for entry in entries)


class Listing:
    """Lists the images of class folders, and counts what it leaves out.

    Args:
        class_folders: All that will be listed: a link that leads into one of them, or above one, is not followed.
    """

    def __init__(self, class_folders: Sequence[Path]) -> None:
        self._covered = {os.path.realpath(folder) for folder in class_folders}
        self._above = {parent for folder in self._covered for parent in _parents(folder)}
        self.endings: Counter[str] = Counter()
        self.links = 0

    def images(self, classes: Mapping[str, Sequence[Path]]) -> dict[str, list[str]]:
        """Sorted paths of the images of each class, those of the subfolders of its folders included.

        A file counts where it lies; a link to it counts only if it lies in none of these folders.
        """
        found = {
            name: [file for folder in folders for file in self._files(folder)] for name, folders in classes.items()
        }
        images: dict[str, list[str]] = {name: [] for name in classes}
        seen: set[str] = set()
        for links in (False, True):
            for name, files in found.items():
                for path, real, is_link in sorted(files):
                    if is_link != links:
                        continue
                    if real in seen:
                        self.links += 1
                    else:
                        seen.add(real)
                        images[name].append(path)
        return {name: sorted(paths) for name, paths in images.items()}

    def _files(self, folder: Path) -> list[tuple[str, str, bool]]:
        """Each image below a folder: its path, where it really is, and whether it is a link itself."""
        found = []
        waiting, visited = [(str(folder), os.path.realpath(folder))], set[str]()
        while waiting:
            here, real_here = waiting.pop()
            if real_here in visited:
                continue
            visited.add(real_here)
            with os.scandir(here) as entries:
                for entry in entries:
                    if _is_folder(entry):
                        if not is_junk(entry.name):
                            waiting += self._follow(entry, real_here)
                    elif _is_image(entry.name):
                        link = entry.is_symlink()
                        real = os.path.realpath(entry.path) if link else os.path.join(real_here, entry.name)
                        found.append((entry.path, real, link))
                    elif not entry.name.startswith("."):
                        self.endings[os.path.splitext(entry.name)[1].lower()] += 1
        return found

    def notes(self) -> list[str]:
        """What was left out, in a line for each reason."""
        lines = []
        if self.endings:
            most = sorted(self.endings.items(), key=lambda item: (-item[1], item[0]))[:8]
            lines.append(f"left out by ending: {', '.join(_with_hint(*item) for item in most)}")
        if self.links:
            lines.append(f"left out {self.links:,} links to images and folders that are listed already")
        return lines

    def _follow(self, entry: os.DirEntry, real_parent: str) -> list[tuple[str, str]]:
        if not entry.is_symlink():
            return [(entry.path, os.path.join(real_parent, entry.name))]
        real = os.path.realpath(entry.path)
        if real in self._covered or real in self._above or not self._covered.isdisjoint(_parents(real)):
            self.links += 1
            return []
        return [(entry.path, real)]


def _is_folder(entry: os.DirEntry) -> bool:
    # Of a link that leads round in a circle the entry itself cannot tell.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in Path(path).parents]


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in readable_endings()


def _with_hint(ending: str, count: int) -> str:
    hint = " (pip install pillow-heif to read them)" if ending in _HEIF else ""
    return f"{count:,} {ending or 'without ending'}{hint}"
