"""A list of files: CSV and similar tables, JSON lines, or two words a line."""

from __future__ import annotations

from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.listing.choosing import is_named_item
from pipelines.ingestion.listing.lists import find_listed
from pipelines.ingestion.listing.sidecars import SIDECAR_SUFFIXES
from pipelines.ingestion.listing.tables import LIST_SUFFIXES
from pipelines.ingestion.reading.files import read_files
from pipelines.ingestion.sources.media_files import (
    choose_modality,
    listing_of,
    read_list,
    select,
)
from pipelines.ingestion.sources.source_type import Listing, Source, SourceType


def _matches(source: Source) -> bool:
    """A file with the suffix of a list, or a folder with nothing but one CSV file."""
    if source.is_one_file:
        return source.has(LIST_SUFFIXES)
    return len(source.files) == 1 and source.has((".csv",))


def _list_chunks(source: Source, cfg: IngestConfig) -> Listing:
    path = source.files[0].path
    listed = read_list(source.fs, path, cfg)
    files = find_listed(listed, path, source.protocol, SIDECAR_SUFFIXES)
    modality = choose_modality([entry for _, _, entry in files], {}, cfg)
    items, passed = select(files, modality, lambda entry: is_named_item(entry, modality))
    return listing_of("list", items, passed, modality, listed.notes, cfg)


FILE_LIST = SourceType(
    name="list",
    noun="",
    matches=_matches,
    list_chunks=_list_chunks,
    read_chunk=read_files,
    modalities=("image", "video"),
)
