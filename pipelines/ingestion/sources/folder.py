"""A folder of image or video files: classes are its folders, or stand in `metadata` files."""

from __future__ import annotations

import dataclasses

from pipelines.config.ingest import IngestConfig
from pipelines.ingestion.entries.entries import File
from pipelines.ingestion.listing.choosing import MODALITIES, is_item, says_what_it_is
from pipelines.ingestion.listing.folder_classes import folder_labels
from pipelines.ingestion.listing.lists import metadata_labels
from pipelines.ingestion.reading.files import read_files
from pipelines.ingestion.sources.media_files import (
    choose_modality,
    listing_of,
    read_list,
    select,
)
from pipelines.ingestion.sources.source_type import Listing, Source, SourceType
from pipelines.runtime.names import escaped

# Hugging Face's imagefolder: labels of the files below it.
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")


def _has_media_names(source: Source) -> bool:
    return any(says_what_it_is(entry.path) for entry in source.files)


def _has_media(source: Source) -> bool:
    files, contents = source.files, source.contents
    return any(is_item(e, modality, contents) for e in files for modality in MODALITIES)


def _list_chunks(source: Source, cfg: IngestConfig) -> Listing:
    """Lists the files of a folder, with the labels of its `metadata` files or of its folders."""
    files = [(e.path.removeprefix(source.base), source.protocol, e) for e in source.files]
    modality = choose_modality(source.files, source.contents, cfg)
    items, passed = select(files, modality, lambda e: is_item(e, modality, source.contents))
    kind = "folder"
    labels, notes = folder_labels([name for name, _, _ in items], cfg.class_level)
    if cfg.class_level is None:
        given, metadata_notes = _metadata(source, {e.path for _, _, e in items}, cfg)
        notes = (*metadata_notes, *(() if given else notes))
        if given:
            kind = "list"  # its labels may be indices
            labels = [given.get(entry.path) for _, _, entry in items]
    if kind == "folder" and cfg.label_column is not None:
        raise ValueError(
            f"--label-column: {cfg.source} is a folder of files without metadata.csv or "
            "metadata.jsonl: its classes are its folders"
        )
    items = [_labelled(file, label) for file, label in zip(items, labels, strict=True)]
    return listing_of(kind, items, passed, modality, notes, cfg)


def _labelled(file: File, label: str | None) -> File:
    name, protocol, entry = file
    return (
        file if entry.label == label else (name, protocol, dataclasses.replace(entry, label=label))
    )


def _metadata(
    source: Source, items: set[str], cfg: IngestConfig
) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """Returns the labels by path that the `metadata` files of a folder give, and notes."""
    labels: dict[str, str | None] = {}
    notes: list[str] = []
    for entry in source.files:
        if entry.path.rpartition("/")[2].lower() not in METADATA_NAMES:
            continue
        try:
            listed = read_list(source.fs, entry.path, cfg)
        except ValueError as error:
            if not str(error).startswith("--source"):  # a column that was asked for
                raise
            notes.append(f"not used for labels: {str(error).removeprefix('--source: ')}")
            continue
        found, lost = metadata_labels(listed, entry.path, source.protocol, items)
        if found and listed.labelled:
            labels |= found
            notes.append(f"labels of {len(found)} files are those in {escaped(entry.path)}")
        if found:
            notes += listed.notes
        if found and lost:
            notes.append(f"{lost} files that {escaped(entry.path)} names are not there")
    if labels and len(labels) < len(items):
        notes.append(f"{len(items) - len(labels)} files are in no metadata file: unlabelled")
    return labels, tuple(notes)


FOLDER = SourceType(
    name="folder",
    noun="images, videos",
    matches=_has_media_names,
    list_chunks=_list_chunks,
    read_chunk=read_files,
    modalities=("image", "video"),
)
FOLDER_BY_CONTENT = dataclasses.replace(FOLDER, matches=_has_media)
"""A folder of files whose names do not say that they are images or videos."""
