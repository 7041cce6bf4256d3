"""A chunk of a source: what one task reads, and the text in which it travels to the task."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pipelines.ingestion.entries.entries import Entry


@dataclass(frozen=True)
class Chunk:
    """The part of a source that one task reads.

    Attributes:
        kind: Name of the `SourceType` that reads it.
        protocol: fsspec's name of the file system.
        entries: Files of a folder or list; or one tar, or one Parquet file.
        row_groups: Parquet only: [start, stop) of the file's row groups; empty when the file could
            not be opened.
        rows: Parquet only: [first, last + 1) of its rows in the file; a file that could not be
            opened counts as one row.
        label_map: Parquet only: The class index of each of the file's own label indices; None when
            they are the same.
    """

    kind: str
    protocol: str
    entries: tuple[Entry, ...]
    row_groups: tuple[int, int] = (0, 0)
    rows: tuple[int, int] = (0, 1)
    label_map: tuple[int, ...] | None = None

    def uri(self, entry: Entry) -> str:
        """Returns the address of `entry`."""
        return entry.path if self.protocol == "file" else f"{self.protocol}://{entry.path}"


def chunk_to_json(chunk: Chunk) -> str:
    """Returns a chunk as text; the keys of staged chunks are hashes of it."""
    entries = [(e.path, e.size, e.tag, e.label, e.sidecars) for e in chunk.entries]
    shared = [chunk.kind, chunk.protocol, entries, chunk.row_groups, chunk.rows]
    return json.dumps([*shared, *([] if chunk.label_map is None else [chunk.label_map])])


def chunk_from_json(text: str) -> Chunk:
    """Returns the chunk that `chunk_to_json` was given."""
    kind, protocol, entries, (start, stop), (first, last), *rest = json.loads(text)
    files = tuple(Entry(path, size, tag, label, tuple(s)) for path, size, tag, label, s in entries)
    label_map = tuple(rest[0]) if rest else None
    return Chunk(kind, protocol, files, (start, stop), (first, last), label_map)
