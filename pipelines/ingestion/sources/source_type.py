"""What a type of source must say of itself, and what it works with.

A source type is one module of this folder with one `SourceType`, listed in registry.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.entries.chunks import Chunk
from pipelines.ingestion.entries.entries import Entry
from pipelines.ingestion.listing.choosing import Counts
from pipelines.ingestion.listing.folders import Found
from pipelines.ingestion.listing.media import Content, Modality
from pipelines.ingestion.reading.items import Item, Tally
from pipelines.runtime.uris import protocol_of


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files at `--source`, before the type of the source is known.

    Attributes:
        fs: fsspec file system.
        root: Path of the source in it: a folder, a file, or a glob pattern.
        base: Folder below which files are named, with a slash at the end.
        found: The files, sorted by path, and what else the walk met.
        contents: What the files are whose suffix does not say it, by path.
    """

    fs: Any
    root: str
    base: str
    found: Found
    contents: dict[str, Content]

    @property
    def files(self) -> list[Entry]:
        """All visible files."""
        return self.found.files

    @property
    def protocol(self) -> str:
        """fsspec's name of the file system."""
        return protocol_of(self.fs)

    @property
    def is_one_file(self) -> bool:
        """Whether the source is a file and not a folder."""
        return len(self.files) == 1 and self.files[0].path == self.root

    def has(self, suffixes: tuple[str, ...]) -> bool:
        """Whether the name of any file ends in one of these, in lower case."""
        return any(entry.path.lower().endswith(suffixes) for entry in self.files)

    def split(self, suffixes: tuple[str, ...]) -> tuple[list[Entry], list[Entry]]:
        """Returns the files with one of these suffixes, and the others.

        A file that is alone is taken whatever its name, because `--format` may say what it is.
        """
        if len(self.files) == 1:
            return self.files, []
        named = [entry for entry in self.files if entry.path.lower().endswith(suffixes)]
        others = [entry for entry in self.files if not entry.path.lower().endswith(suffixes)]
        return named, others


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A source, cut into chunks.

    Attributes:
        kind: How it is read: the name of a `SourceType`.
        chunks: In source order, which decides which of two equal images is kept. The same files
            must always give the same chunks.
        num_items: Number of images or videos; None where it is not known without reading, as of
            tars.
        num_bytes: Bytes of all files.
        modality: What the items are.
        passed_over: Number of files that are not read, by suffix.
        notes: What the user should know of how the source was read, a sentence each.
        classes: Class names by index, where the source declares them (Hugging Face Parquet).
    """

    kind: str
    chunks: tuple[Chunk, ...]
    num_items: int | None
    num_bytes: int
    modality: Modality = "image"
    passed_over: Counts = ()
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def ignored(self) -> int:
        """Number of files that are not read."""
        return sum(count for _, count in self.passed_over)


Reader: TypeAlias = Callable[[Any, Chunk, IngestConfig, Tally], Iterator[Item]]


@dataclass(frozen=True, kw_only=True)
class SourceType:
    """One type of source.

    Attributes:
        name: As in `Chunk.kind` and `--format`.
        noun: What error messages call its files.
        matches: Whether a source is of this type.
        list_chunks: Cuts a source of this type into chunks. Raises ValueError, with the flag to
            change, when there is nothing to read.
        read_chunk: Yields the items of one chunk in order, given the file system. An item that
            cannot be read is yielded with its problem. Labels that are found behind their items,
            and counts of what is no item, go into the tally.
        modalities: What its items may be.
        version: Raise it when the same chunk gives other items than before, so that nothing staged
            by older code is used again. 0 is the first.
    """

    name: str
    noun: str
    matches: Callable[[Source], bool]
    list_chunks: Callable[[Source, IngestConfig], Listing]
    read_chunk: Reader
    modalities: tuple[Modality, ...] = ("image",)
    version: int = 0
