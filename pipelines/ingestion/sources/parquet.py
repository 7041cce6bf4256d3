"""Parquet files with a column of images; one chunk is a run of row groups."""

from __future__ import annotations

import dataclasses

from pipelines.config.ingest import LABEL_COLUMN, IngestConfig
from pipelines.ingestion.entries.chunks import Chunk
from pipelines.ingestion.listing.choosing import count_suffixes
from pipelines.ingestion.listing.chunking import CHUNK_BYTES
from pipelines.ingestion.listing.parquet_listing import list_parquet, partition_label
from pipelines.ingestion.reading.parquet_reading import read_parquet
from pipelines.ingestion.sources.source_type import Listing, Source, SourceType

PARQUET_SUFFIXES = (".parquet",)


def _list_chunks(source: Source, cfg: IngestConfig) -> Listing:
    files, others = source.split(PARQUET_SUFFIXES)
    found = list_parquet(source.fs, [entry.path for entry in files], cfg, CHUNK_BYTES)
    if all(run.rows[0] == run.rows[1] for run in found.runs):
        raise ValueError(f"--source: the Parquet files at {cfg.source} have no rows")
    column = cfg.label_column or LABEL_COLUMN
    labels = [partition_label(entry.path, column) for entry in files]
    files = [dataclasses.replace(e, label=label) for e, label in zip(files, labels, strict=True)]
    chunks = tuple(
        Chunk("parquet", source.protocol, (files[r.file],), r.row_groups, r.rows, r.label_map)
        for r in found.runs
    )
    return Listing(
        kind="parquet",
        chunks=chunks,
        num_items=found.num_items,
        num_bytes=sum(entry.size for entry in files),
        passed_over=count_suffixes(others),
        classes=found.classes,
        notes=found.notes,
    )


PARQUET = SourceType(
    name="parquet",
    noun="Parquet files",
    matches=lambda source: source.has(PARQUET_SUFFIXES),
    list_chunks=_list_chunks,
    read_chunk=read_parquet,
    version=1,
)
