"""The table of source types, and the two functions that use it: list a source, read a chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from models.file_systems import file_system
from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.entries.addresses import open_address
from pipelines.ingestion.entries.chunks import Chunk
from pipelines.ingestion.listing.choosing import count_suffixes, says_what_it_is, told
from pipelines.ingestion.listing.chunking import path_hash
from pipelines.ingestion.listing.finding import Progress, find, notes_of
from pipelines.ingestion.listing.media import look_into
from pipelines.ingestion.reading.items import Item, Tally
from pipelines.ingestion.sources.file_list import FILE_LIST
from pipelines.ingestion.sources.folder import FOLDER, FOLDER_BY_CONTENT
from pipelines.ingestion.sources.parquet import PARQUET
from pipelines.ingestion.sources.source_type import Listing, Source, SourceType
from pipelines.ingestion.sources.webdataset import WEBDATASET

SOURCE_TYPES: tuple[SourceType, ...] = (
    FILE_LIST,
    FOLDER,
    WEBDATASET,
    PARQUET,
    # Last, because tars and Parquet files have files of any name beside them, like Spark's
    # _SUCCESS.
    FOLDER_BY_CONTENT,
)
"""The first that matches a source reads it; `--format` leaves one name to choose from."""

# Archives that are not read.
OTHER_ARCHIVES = (
    *(".zip", ".7z", ".rar", ".lz4", ".lz", ".lzo", ".lzma", ".z", ".cpio"),
    *(".gz", ".bz2", ".xz", ".zst"),
)


def source_type(name: str) -> SourceType:
    """Returns the source type of that name."""
    return next(each for each in SOURCE_TYPES if each.name == name)


def list_source(cfg: IngestConfig, progress: Progress | None = None) -> Listing:
    """Lists `cfg.source` and cuts it into chunks.

    Args:
        cfg: The ingest configuration.
        progress: Takes the number of files found so far.

    Raises:
        ValueError: There is nothing to read; there are images and videos and `cfg.modality` does
            not say which; a flag does not go with this type of source; or a Parquet file lacks the
            image column or the label column that was named.
    """
    source = open_source(cfg, progress)
    kind = choose_type(source, cfg)
    _check_flags(kind, cfg)
    listing = kind.list_chunks(source, cfg)
    return dataclasses.replace(listing, notes=(*notes_of(source.found), *listing.notes))


def read_chunk(chunk: Chunk, cfg: IngestConfig, tally: Tally | None = None) -> Iterator[Item]:
    """Yields every item of a chunk in order; an item that cannot be read has a problem.

    Args:
        chunk: What to read.
        cfg: The ingest configuration.
        tally: Receives what is found besides the items, such as the labels of a tar.

    Raises:
        OSError: The storage as a whole failed (no connection, busy); ingest can be run again.
    """
    read = source_type(chunk.kind).read_chunk
    yield from read(file_system(chunk.protocol), chunk, cfg, Tally() if tally is None else tally)


def open_source(cfg: IngestConfig, progress: Progress | None = None) -> Source:
    """Finds the files at `cfg.source`, and looks into those whose suffix says nothing.

    Args:
        cfg: The ingest configuration.
        progress: Takes the number of files found so far.

    Raises:
        ValueError: The source does not exist, may not be listed, or has an address that is not
            read.
    """
    fs, root = open_address(cfg.source)
    found, base = find(fs, root, fs._strip_protocol(cfg.out), progress)
    if not found.files and not fs.exists(root):
        raise ValueError(f"--source: {cfg.source} does not exist")
    unknown = [entry for entry in found.files if not says_what_it_is(entry.path)]
    unknown.sort(key=lambda entry: path_hash(entry.path.removeprefix(base)))
    return Source(fs=fs, root=root, base=base, found=found, contents=look_into(fs, unknown))


def choose_type(source: Source, cfg: IngestConfig) -> SourceType:
    """Returns the first source type that matches, among those that `cfg.format` allows.

    Raises:
        ValueError: None does.
    """
    for each in SOURCE_TYPES:
        forced = source.is_one_file and each.name == cfg.format
        if cfg.format in ("auto", each.name) and (forced or each.matches(source)):
            return each
    nouns = list(dict.fromkeys(each.noun for each in SOURCE_TYPES if each.noun))
    wanted = f"{', '.join(nouns[:-1])} or {nouns[-1]}" if cfg.format == "auto" else cfg.format
    there = told(count_suffixes(source.files))
    archives = [e.path for e in source.files if e.path.lower().endswith(OTHER_ARCHIVES)]
    way_out = (
        f"; unpack {archives[0]}, or pack it as .tar (.gz, .bz2, .xz, .zst)" if archives else ""
    )
    raise ValueError(f"--source: no {wanted} found at {cfg.source} ({there}){way_out}")


def _check_flags(kind: SourceType, cfg: IngestConfig) -> None:
    if cfg.image_member and kind.name != "webdataset":
        raise ValueError(f"--image-member: goes with tars, and {cfg.source} is a {kind.name}")
    if cfg.class_level is not None and kind.name != "folder":
        message = f"goes with folders of files, and {cfg.source} is a {kind.name}"
        raise ValueError(f"--class-level: {message}")
    if cfg.modality == "video" and "video" not in kind.modalities:
        message = f"videos are read from folders and lists, not from {kind.name}"
        raise ValueError(f"--modality: {message}")
