"""Reads files that are images or videos; a file that cannot be read is an item with a problem."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.entries.chunks import Chunk
from pipelines.ingestion.entries.entries import UNLISTED, Entry
from pipelines.ingestion.entries.failures import problem_of, too_many_bytes
from pipelines.ingestion.listing.sidecars import sidecar_path
from pipelines.ingestion.reading.items import Item, Tally
from pipelines.ingestion.reading.labels import Label, as_label
from pipelines.runtime.uris import local_file

READ_BYTES = 32 * 2**20
NO_FILE = ("unreadable", "no regular file, or a link to nothing")
NO_LISTING = ("unreadable", "a folder that this user may not list")


def read_files(fs: Any, chunk: Chunk, cfg: IngestConfig, _: Tally) -> Iterator[Item]:
    """Yields every file of a folder's or list's chunk, in order.

    Raises:
        OSError: The storage as a whole failed.
    """
    yield from (_read_videos if cfg.modality == "video" else _read_images)(fs, chunk, cfg)


def _label_of(entry: Entry, chunk: Chunk) -> Label:
    """A folder's name is a name even when it is a number; a list's "3" is a class index."""
    return as_label(entry.label) if chunk.kind == "list" else entry.label


def _read_images(fs: Any, chunk: Chunk, cfg: IngestConfig) -> Iterator[Item]:
    for group in _groups(chunk.entries, READ_BYTES):
        wanted = [entry for entry in group if 0 <= entry.size <= cfg.max_bytes]
        # cat_ranges, unlike cat, leaves "*" and "[" in names alone; S3 fetches concurrently.
        contents = fs.cat_ranges([e.path for e in wanted], None, None, on_error="return")
        by_path = {entry.path: data for entry, data in zip(wanted, contents, strict=True)}
        for entry in group:
            uri, data = chunk.uri(entry), by_path.get(entry.path)
            if entry.size < 0:
                yield Item(uri, problem=NO_LISTING if entry.size == UNLISTED else NO_FILE)
            elif data is None:
                yield Item(uri, problem=too_many_bytes(entry.size, cfg.max_bytes))
            elif isinstance(data, BaseException):
                yield Item(uri, problem=problem_of(data))
            else:
                yield Item(uri, data, _label_of(entry, chunk))


def _groups(entries: Iterable[Entry], limit: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    size = 0
    for entry in entries:
        if group and size + entry.size > limit:
            yield group
            group, size = [], 0
        group.append(entry)
        size += entry.size
    if group:
        yield group


def _read_videos(fs: Any, chunk: Chunk, cfg: IngestConfig) -> Iterator[Item]:
    """Yields videos as files on this machine: they may be larger than its memory."""
    for entry in chunk.entries:
        uri = chunk.uri(entry)
        if entry.size < 0:
            yield Item(uri, problem=NO_LISTING if entry.size == UNLISTED else NO_FILE)
            continue
        if entry.size > cfg.video.max_bytes:
            yield Item(uri, problem=too_many_bytes(entry.size, cfg.video.max_bytes))
            continue
        with contextlib.ExitStack() as stack:
            try:
                path = stack.enter_context(local_file(fs, entry.path))
                sidecars = tuple((name, _sidecar(fs, entry, name, cfg)) for name in entry.sidecars)
            except OSError as error:
                yield Item(uri, problem=problem_of(error))
                continue
            label = _label_of(entry, chunk)
            yield Item(uri, path=path, label=label, sidecars=sidecars, size=entry.size)


def _sidecar(fs: Any, entry: Entry, name: str, cfg: IngestConfig) -> bytes:
    with fs.open(sidecar_path(entry.path, name), "rb") as file:
        data: bytes = file.read(cfg.max_bytes + 1)  # the preparer refuses what is over the limit
    return data
