"""Cuts the files of a folder or list into chunks.

Files are ordered by the hash of their path below the source, not by name: files of one class stand
together in name order, and shards written in that order would give batches of one class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from pipelines.ingestion.entries.chunks import Chunk
from pipelines.ingestion.entries.entries import Entry, File
from pipelines.ingestion.listing.media import Modality
from pipelines.runtime.names import escaped

CHUNK_ITEMS = 512
CHUNK_BYTES = 64 * 2**20
# A second of video costs as much as many images: about a minute of one core a chunk.
VIDEO_CHUNK_ITEMS = 32
VIDEO_CHUNK_BYTES = 8 * 2**20


def cut_files(kind: str, files: Sequence[File], modality: Modality) -> tuple[Chunk, ...]:
    """Cuts files into a power of two of chunks by hash, so that a few new files change few chunks.

    Args:
        kind: Name of the source type that reads the chunks.
        files: In any order.
        modality: What the files are; chunks of videos are smaller.
    """
    keyed = [(path_hash(name), protocol, entry) for name, protocol, entry in files]
    keyed.sort(key=lambda file: (file[0], file[2].path))
    size = sum(max(entry.size, 0) for _, _, entry in files)
    items, bytes_ = CHUNK_ITEMS, CHUNK_BYTES
    if modality == "video":
        items, bytes_ = VIDEO_CHUNK_ITEMS, VIDEO_CHUNK_BYTES
    needed = max(len(keyed) / items, size / bytes_, 1)
    count = 1 << (int(needed - 1e-9)).bit_length()
    buckets: dict[tuple[int, str], list[Entry]] = {}
    for key, protocol, entry in keyed:
        buckets.setdefault((key * count >> 64, protocol), []).append(entry)
    return tuple(Chunk(kind, at[1], tuple(bucket)) for at, bucket in buckets.items())


def path_hash(path: str) -> int:
    """Returns 64 bits of the BLAKE2b hash of a path."""
    return int.from_bytes(hashlib.blake2b(escaped(path).encode(), digest_size=8).digest())
