"""Finds the files that a list names, under each spelling that the name may have."""

from __future__ import annotations

import dataclasses
import posixpath
import unicodedata
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote

from models.file_systems import file_system
from pipelines.ingestion.entries.addresses import open_address
from pipelines.ingestion.entries.entries import NO_FILE, Entry, File, entry_of, local_entry
from pipelines.ingestion.listing.tables import FileList, readable
from pipelines.runtime.names import escaped
from pipelines.runtime.uris import is_local, protocol_of

Place = tuple[str, str]  # protocol, path in its file system


def find_listed(listed: FileList, path: str, protocol: str, beside: tuple[str, ...]) -> list[File]:
    """Returns the files of a list, and those beside them that belong to them.

    Paths are relative to the list's folder, absolute, or URIs. A file that is not there is an entry
    without a size, which the reader reports.

    Args:
        listed: what the list says.
        path: where it lies.
        protocol: of that file system.
        beside: what the suffix of a listed file is replaced by, to name files that belong to it.

    Raises:
        ValueError: not one of the files is there.
    """
    folder = path.rpartition("/")[0]
    places = [[_place(way, folder, protocol) for way in _spellings(row[0])] for row in listed.rows]
    there = _list_parents({place for ways in places for place in ways})
    found: list[File] = []
    lost = 0
    for (name, label), ways in zip(listed.rows, places, strict=True):
        kind, at = next((place for place in ways if place in there), ways[0])
        entry = there.get((kind, at), Entry(at, NO_FILE, ""))
        lost += (kind, at) not in there
        found.append((name, kind, dataclasses.replace(entry, label=label)))
        stem = posixpath.splitext(at)[0]
        belonging = [(kind, stem + ending) for ending in beside]
        found += [(place[1], kind, there[place]) for place in belonging if place in there]
    if lost == len(listed.rows):
        first = f"the first, {_shortened(listed.rows[0][0])!r}, was looked for at"
        where = _shortened(places[0][0][1])
        raise ValueError(
            f"--source: of the {lost} files that {escaped(path)} names none is there; "
            f"{first} {where}"
        )
    return found


def metadata_labels(
    listed: FileList, path: str, protocol: str, there: Container[str]
) -> tuple[dict[str, str | None], int]:
    """Returns the labels that a Hugging Face `metadata` file gives to the files it lies above.

    Args:
        listed: what it says.
        path: where it lies.
        protocol: of that file system.
        there: paths of the files that there are.

    Returns:
        Labels by path, and how many files it names that are not there.
    """
    folder = path.rpartition("/")[0]
    labels: dict[str, str | None] = {}
    lost = 0
    for name, label in listed.rows:
        ways = [_place(way, folder, protocol)[1] for way in _spellings(name)]
        at = next((way for way in ways if way in there), None)
        if at is None:
            lost += 1
        else:
            labels[at] = label
    return labels, lost


def _spellings(name: str) -> list[str]:
    """Returns the names by which a file may be called that a list calls so, itself first.

    Lists come from Windows (its separator, its encodings) and from Macs (letters with their accents
    apart), or go there.
    """
    known = [name, name.replace("\\", "/")]
    if "%" in name:  # as addresses are written
        known.append(unquote(name))
    if not name.isascii():
        texts = [readable(way) for way in known] if escaped(name) != name else []
        known += texts
        known += [unicodedata.normalize("NFC", way) for way in known]
        known += [unicodedata.normalize("NFD", way) for way in known]
    return list(dict.fromkeys(known))


def _shortened(name: str) -> str:
    """A quote that is not closed makes one name of the rest of the list."""
    text = escaped(name)
    return text if len(text) <= 400 else f"{text[:200]}..."


def _place(name: str, folder: str, protocol: str) -> Place:
    if "://" in name:
        fs, path = open_address(name)
        return protocol_of(fs), path
    return protocol, posixpath.normpath(posixpath.join(folder, name))


def _list_parents(places: set[Place]) -> dict[Place, Entry]:
    """Returns every file in the folders of these places, by place: one listing a folder."""
    folders = sorted({(protocol, path.rpartition("/")[0]) for protocol, path in places})

    def files(folder: Place) -> dict[Place, Entry]:
        return {(folder[0], entry.path): entry for entry in _list_folder(*folder)}

    with ThreadPoolExecutor(16) as pool:
        return {key: entry for found in pool.map(files, folders) for key, entry in found.items()}


def _list_folder(protocol: str, folder: str) -> Iterator[Entry]:
    fs = file_system(protocol)
    try:
        infos = fs.ls(folder, detail=not is_local(fs))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    for info in infos:
        if isinstance(info, str):  # fsspec does not say what a link leads to
            entry = local_entry(info)
            if entry is not None:
                yield entry
        elif info["type"] != "directory":
            yield entry_of(info["name"], info)
