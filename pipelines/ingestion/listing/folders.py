"""The files of a local folder, links followed.

fsspec calls a link neither file nor folder, whatever it leads to; so local folders are walked here.
A folder is walked once, however many links lead to it: under its own name if that lies in the
source, else under the first link's in the order of paths. So circles end.
"""

from __future__ import annotations

import heapq
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from pipelines.ingestion.entries.entries import UNLISTED, Entry, local_entry
from pipelines.ingestion.listing.media import suffix_of


@dataclass
class Found:
    """What lies below a folder.

    Attributes:
        files: sorted by path.
        again: folders met once more through a link, and not walked again.
        stored: files without a suffix that are left out, because links in the source lead to them:
            what stores contents by their hash (Hugging Face's `blobs`) has names in the links
            alone.
    """

    files: list[Entry] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)


Enters = Callable[[str], bool]


def walk(base: str, out: str, enters: Enters = lambda _: True) -> Found:
    """Returns every visible file below `base`; the name decides, not what a link leads to.

    Args:
        base: a local folder, with "/" at the end.
        out: a folder that is passed over, whatever leads to it.
        enters: says of a folder, by its path below `base`, whether to walk it.

    Raises:
        PermissionError: `base` itself may not be listed.
    """
    walk = _Walk(base, enters)
    walk.run(os.path.realpath(out))
    found = walk.found
    found.stored = sorted(path for real, path in walk.plain.items() if real in walk.targets)
    stored = set(found.stored)
    found.files = [entry for entry in found.files if entry.path not in stored]
    found.files.sort(key=lambda entry: entry.path)
    return found


class _Walk:
    def __init__(self, base: str, enters: Enters) -> None:
        self.found = Found()
        self._base, self._enters = base, enters
        self._folders = [(base, os.path.realpath(base))]
        self._links: list[str] = []  # a heap
        self.targets: set[str] = set()  # what links to files lead to
        self.plain: dict[str, str] = {}  # files without a suffix: path by real path

    def run(self, out: str) -> None:
        seen: set[str] = set()
        while self._folders or self._links:
            if self._folders:
                folder, real = self._folders.pop()
            else:  # only now is every folder known that is there under its own name
                folder = heapq.heappop(self._links)
                real = os.path.realpath(folder)
            if real in seen:
                self.found.again.append(folder)
            elif real != out:
                seen.add(real)
                self._list(folder, real)

    def _list(self, folder: str, real: str) -> None:
        """Notes the files of one folder, and the folders in it to walk next."""
        try:
            with os.scandir(folder) as entries:
                visible = sorted((e for e in entries if not e.name.startswith(".")), key=_name)
        except PermissionError:
            if folder == self._base:
                raise
            self.found.files.append(Entry(folder, UNLISTED, ""))
            return
        except FileNotFoundError:  # removed while we walk
            return
        prefix = folder if folder.endswith("/") else f"{folder}/"
        for each in visible:
            path = prefix + each.name
            if not _is_folder(each):
                self._add_file(path)
                if each.is_symlink():
                    self.targets.add(os.path.realpath(path))
                elif not suffix_of(path):
                    self.plain[os.path.join(real, each.name)] = path  # noqa: PTH118
            elif self._enters(path.removeprefix(self._base)):
                if each.is_symlink():
                    heapq.heappush(self._links, path)
                else:
                    self._folders.append((path, os.path.join(real, each.name)))  # noqa: PTH118

    def _add_file(self, path: str) -> None:
        try:
            entry = local_entry(path)
        except FileNotFoundError:  # removed while we walk
            return
        if entry is not None:
            self.found.files.append(entry)


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle
        return False


def walk_matching(pattern: str, out: str) -> tuple[Found, str]:
    """Returns the visible files that a glob pattern matches, and the folder before its first sign.

    Folders that the pattern cannot match are not walked, so that links in them name nothing.
    """
    from fsspec.utils import glob_translate

    magic = re.search(r"[*?[]", pattern)
    assert magic is not None, "no pattern"
    base = pattern[: pattern.rfind("/", 0, magic.start()) + 1]
    parts = pattern.removeprefix(base).split("/")

    def enters(folder: str) -> bool:
        for part, name in zip(parts, folder.split("/"), strict=False):
            if "**" in part:
                return True
            if not fnmatchcase(name, part):
                return False
        return folder.count("/") + 1 < len(parts)

    if not os.path.isdir(base):  # noqa: PTH112
        return Found(), base
    found = walk(base, out, enters)
    matches = re.compile(glob_translate(pattern)).match
    found.files = [entry for entry in found.files if matches(entry.path)]
    return found, base
