"""Tars, as WebDataset writes them or packed by hand; one chunk is one tar."""

from __future__ import annotations

from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.entries.chunks import Chunk
from pipelines.ingestion.listing.choosing import count_suffixes
from pipelines.ingestion.reading.tar_reading import read_tar
from pipelines.ingestion.sources.source_type import Listing, Source, SourceType

TAR_SUFFIXES = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz"),
    *(".tar.xz", ".txz", ".tar.zst", ".tzst"),
)


def _list_chunks(source: Source, cfg: IngestConfig) -> Listing:
    tars, others = source.split(TAR_SUFFIXES)
    chunks = tuple(Chunk("webdataset", source.protocol, (tar,)) for tar in tars)
    return Listing(
        kind="webdataset",
        chunks=chunks,
        num_items=None,
        num_bytes=sum(tar.size for tar in tars),
        passed_over=count_suffixes(others),
    )


WEBDATASET = SourceType(
    name="webdataset",
    noun="tars",
    matches=lambda source: source.has(TAR_SUFFIXES),
    list_chunks=_list_chunks,
    read_chunk=read_tar,
    version=1,
)
