"""What folders and lists share: which of their files are items, and the listing of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipelines.config.ingest import IMAGE_COLUMN, IngestConfig
from pipelines.ingestion.entries.entries import Entry, File
from pipelines.ingestion.listing.choosing import Counts, count_suffixes, find_modality, told
from pipelines.ingestion.listing.chunking import cut_files
from pipelines.ingestion.listing.media import Content, Modality
from pipelines.ingestion.listing.sidecars import attach_sidecars
from pipelines.ingestion.listing.tables import FileList, read_file_list
from pipelines.ingestion.sources.source_type import Listing
from pipelines.runtime.names import escaped


def choose_modality(
    entries: Sequence[Entry], contents: dict[str, Content], cfg: IngestConfig
) -> Modality:
    """Returns `cfg.modality`, or for `auto` what the files are.

    Raises:
        ValueError: There are both images and videos.
    """
    if cfg.modality != "auto":
        return cfg.modality
    modality = find_modality(entries, contents)
    if modality is None:
        raise ValueError(f"--modality: both images and videos at {cfg.source}: say which to take")
    return modality


def select(
    files: list[File], modality: Modality, wanted: Callable[[Entry], bool]
) -> tuple[list[File], Counts]:
    """Returns the files that are items, and the number of the others by suffix."""
    files = attach_sidecars(files) if modality == "video" else files
    items, passed = list[File](), list[Entry]()
    for file in files:
        if wanted(file[2]):
            items.append(file)
        else:
            passed.append(file[2])
    return items, count_suffixes(passed)


def listing_of(
    kind: str,
    items: Sequence[File],
    passed: Counts,
    modality: Modality,
    notes: tuple[str, ...],
    cfg: IngestConfig,
) -> Listing:
    """Cuts the items into chunks.

    Raises:
        ValueError: There are none.
    """
    if not items:
        raise ValueError(f"--source: no {modality}s found at {cfg.source} ({told(passed)})")
    return Listing(
        kind=kind,
        chunks=cut_files(kind, items, modality),
        num_items=len(items),
        num_bytes=sum(max(entry.size, 0) for _, _, entry in items),
        modality=modality,
        passed_over=passed,
        notes=notes,
    )


def read_list(fs: Any, path: str, cfg: IngestConfig) -> FileList:
    """Reads a list of files with the columns that `cfg` names.

    Raises:
        ValueError: It cannot be read, names no file, or lacks a column that was named.
    """
    image = cfg.image_column if cfg.image_column != IMAGE_COLUMN else ""
    name = escaped(path.rpartition("/")[2])
    return read_file_list(
        fs.cat_file(path), name, path_column=image, label_column=cfg.label_column or ""
    )
