"""Finds every visible file of a source, local or remote."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from pipelines.ingestion.entries.entries import UNLISTED, Entry, entry_of, local_entry
from pipelines.ingestion.listing.folders import Found, walk, walk_matching
from pipelines.runtime.names import escaped
from pipelines.runtime.uris import is_local, is_s3

Progress: TypeAlias = Callable[[int], None]
"""Takes the number of files found so far."""


def find(fs: Any, root: str, out: str, progress: Progress | None = None) -> tuple[Found, str]:
    """Returns every visible file below `root`, sorted by path, and the folder `root` stands for.

    Hidden files, and what lies below `out`, are passed over. A file's label is its folder's name.

    Args:
        fs: the file system.
        root: a folder, a glob pattern, or one file, in it.
        out: where the data set is written, in it.
        progress: is called while a bucket is listed, page by page.

    Raises:
        ValueError: this user may not list it.
    """
    is_pattern = glob.has_magic(root) and not fs.exists(root)
    if is_local(fs):
        found, base = walk_matching(root, out) if is_pattern else _walk(root, out)
    else:
        found, base = _list_remote(fs, root, out, progress, is_pattern=is_pattern)
    files = [_with_folder(entry, base) for entry in found.files]
    return dataclasses.replace(found, files=files), base


def notes_of(found: Found) -> Iterator[str]:
    """Yields what the user should know of links and closed folders in the source."""
    if found.again:
        first, count = escaped(found.again[0]), len(found.again)
        yield f"{count} linked folders lead to what is in the source already: {first}, ..."
    folders = [entry.path for entry in found.files if entry.size == UNLISTED]
    if folders:
        yield f"{len(folders)} folders may not be listed by this user: {escaped(folders[0])}, ..."
    if found.stored:
        yield f"{len(found.stored)} files without a suffix are taken by the links to them alone"


def _walk(root: str, out: str) -> tuple[Found, str]:
    try:
        entry = local_entry(root)
        if entry is not None:
            return Found([entry]), root.rpartition("/")[0] + "/"
        base = f"{root.rstrip('/')}/"
        return walk(base, out), base
    except FileNotFoundError:
        return Found(), root
    except PermissionError as error:
        raise ValueError(f"--source: {root} may not be listed by this user") from error


def _list_remote(
    fs: Any, root: str, out: str, progress: Progress | None, *, is_pattern: bool
) -> tuple[Found, str]:
    infos: dict[str, dict[str, Any]]
    if is_pattern:
        base = re.split("[*?[]", root)[0].rpartition("/")[0] + "/"
        infos = fs.glob(root, detail=True)
    else:
        on_page = {"on_page": progress} if is_s3(fs) and progress else {}
        infos = fs.find(root, detail=True, **on_page)
        base = root.rpartition("/")[0] + "/" if root in infos else root + "/"
    found = Found()
    for path, info in sorted(infos.items()):
        parts = path.removeprefix(base).split("/")
        hidden = any(part.startswith(".") for part in parts) or path.startswith(f"{out}/")
        if not hidden and info["type"] != "directory" and not path.endswith("/"):
            found.files.append(entry_of(path, info))
    return found, base


def _with_folder(entry: Entry, base: str) -> Entry:
    folders = list(filter(None, entry.path.removeprefix(base).split("/")[:-1]))
    return dataclasses.replace(entry, label=folders[-1]) if folders else entry
