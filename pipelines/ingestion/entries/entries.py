"""One file of a source."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Any, TypeAlias

NO_FILE = -1  # in place of a size: a link to nothing, a pipe
UNLISTED = -2  # likewise: a folder that this user may not list


@dataclass(frozen=True)
class Entry:
    """One file of a source.

    Attributes:
        path: in its file system, without protocol; bytes that are not UTF-8 as lone surrogates.
        size: bytes, of what a link leads to; negative for what is no regular file.
        tag: changes when the file does (ETag or modification time, of what a link leads to).
        label: class name from the folder, or as the list has it; None for files at the top.
        sidecars: which of `sidecars.SIDECARS` lie beside it.
    """

    path: str
    size: int
    tag: str
    label: str | None = None
    sidecars: tuple[str, ...] = ()


File: TypeAlias = tuple[str, str, Entry]
"""Name below the source, protocol, and the file."""


def entry_of(path: str, info: dict[str, Any], label: str | None = None) -> Entry:
    """Returns the entry of a file that fsspec has listed."""
    tag = info.get("ETag") or info.get("mtime") or info.get("LastModified") or ""
    size = NO_FILE if info["type"] == "other" else int(info["size"] or 0)
    return Entry(path, size, str(tag), label)


def local_entry(path: str, label: str | None = None) -> Entry | None:
    """Returns the entry of a local file, links followed; None for a folder.

    Raises:
        FileNotFoundError: there is nothing of that name, no link either.
    """
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:  # a link to nothing, in a circle, or into a folder that may not be entered
        status = os.lstat(path)
    if stat.S_ISDIR(status.st_mode):
        return None
    size = status.st_size if stat.S_ISREG(status.st_mode) else NO_FILE
    return Entry(path, size, str(status.st_mtime or ""), label)
