"""Stage 1 of ingest, one Ray task a chunk: read, validate, hash, re-encode, write staging parts.

    OUT/_staging/<key>-<n>.parquet      rows ready for a shard, about 64 MiB a part
    OUT/_staging/<key>.items.parquet    one row per row, refused item or loss; written last, so it
                                        means "done"

`<key>` hashes the chunk and every setting that shapes its rows. A killed ingest finds its finished
chunks by these names, and nothing but the settings and the source decides what is in them.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.images import ImageError
from models.video_decode import VideoError
from pipelines.config import IngestConfig
from pipelines.preparing import prepare_image
from pipelines.readers import Item, read_chunk
from pipelines.shards import SCHEMAS, encode_table, hash_bytes, open_shards, put_atomic
from pipelines.sources import Chunk, Entry
from pipelines.video_preparing import prepare_video
from pipelines.video_reading import Loss

VERSION = 3  # raise it when the same input would give other rows
PART_BYTES = 64 * 2**20
STAGING = "_staging"

ITEMS_SCHEMA = pa.schema(
    [
        # Place of the row among those of its item, from 0; NO_ROW for what is missing of an item.
        ("segment", pa.int32()),
        ("sample_id", pa.binary(16)),  # null for a refused item, like all down to notes
        ("size", pa.int64()),
        ("num_frames", pa.int32()),
        ("part", pa.int32()),
        ("label_index", pa.int32()),
        ("label_name", pa.string()),
        ("notes", pa.list_(pa.string())),  # what is counted of good rows; null where nothing is
        ("source_uri", pa.string()),  # null for a good one, like all down from here
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
NO_ROW = -1

# Settings that say where things are or how rows are packed, not what is in a row.
_NOT_CONTENT = ("source", "out", "format", "shard_bytes", "row_group_rows", "follow", "live")
# Settings that say nothing about this modality.
_NOT_OF = {
    "image": ("video",),
    "video": (
        *("image_column", "label_column", "encode", "quality", "max_pixels"),
        *("background", "deep_range"),
    ),
}


def chunk_key(chunk: str, cfg: IngestConfig) -> str:
    """Returns 32 hex digits naming the result of a chunk, given as JSON."""
    without = (*_NOT_CONTENT, *_NOT_OF[cfg.modality])
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in without}
    return hash_bytes(json.dumps([VERSION, settings, chunk], sort_keys=True).encode()).hex()


def chunk_to_json(chunk: Chunk) -> str:
    """Returns `chunk` as text: what travels to the task."""
    entries = [(e.path, e.size, e.tag, e.label, e.sidecars) for e in chunk.entries]
    return json.dumps([chunk.kind, chunk.protocol, entries, chunk.row_groups, chunk.rows])


def chunk_from_json(text: str) -> Chunk:
    """Rebuilds a chunk from `chunk_to_json`'s text."""
    kind, protocol, entries, (start, stop), (first, last) = json.loads(text)
    files = tuple(Entry(path, size, tag, label, tuple(s)) for path, size, tag, label, s in entries)
    return Chunk(kind, protocol, files, (start, stop), (first, last))


def staged_schema(modality: str) -> pa.Schema:
    """Returns the columns of staging parts: a shard's, the label not yet an index, and moments."""
    fields = [field for field in SCHEMAS[modality] if field.name != "label"]
    labels = [pa.field("label_index", pa.int32()), pa.field("label_name", pa.string())]
    # Means of pixels and of squared pixels, RGB each, of pixels in [0, 1].
    return pa.schema([*fields, *labels, pa.field("moments", pa.list_(pa.float64(), 6))])


class _Parts:
    """Collects rows and writes them out as numbered parts of about `PART_BYTES`."""

    def __init__(self, fs: Any, prefix: str, modality: str) -> None:
        self._fs, self._prefix, self._modality = fs, prefix, modality
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self.number = 0

    def add(self, row: dict[str, Any]) -> int:
        """Takes a row and returns the number of the part it will be in."""
        number = self.number
        self._rows.append(row)
        self._bytes += len(row[self._modality])
        if self._bytes >= PART_BYTES:
            self.flush()
        return number

    def flush(self) -> None:
        if self._rows:
            table = pa.Table.from_pylist(self._rows, staged_schema(self._modality))
            path = part_path(self._prefix, self.number)
            put_atomic(self._fs, path, encode_table(table, 64))
            self._rows, self._bytes, self.number = [], 0, self.number + 1


def part_path(prefix: str, number: int) -> str:
    """Returns where part `number` of the chunk at `prefix` lies."""
    return f"{prefix}-{number}.parquet"


def items_path(prefix: str) -> str:
    """Returns where the list of the chunk's items lies; its presence means the chunk is done."""
    return f"{prefix}.items.parquet"


def stage_chunk(row: dict[str, Any], cfg: IngestConfig) -> dict[str, Any]:
    """Does one chunk (a Ray Data `map` function).

    Args:
        row: `chunk` (JSON) and `key`.
        cfg: the ingest configuration.

    Returns:
        `key`, `items` and `bytes` done, for the progress bar.
    """
    fs, root = open_shards(cfg.out)
    prefix = f"{root}/{STAGING}/{row['key']}"
    parts = _Parts(fs, prefix, cfg.modality)
    items: list[dict[str, Any]] = []
    count = done = 0
    for item in read_chunk(chunk_from_json(row["chunk"]), cfg):
        items += _stage_item(item, cfg, parts)
        count, done = count + 1, done + item.num_bytes
    parts.flush()
    table = pa.Table.from_pylist(items, ITEMS_SCHEMA)
    put_atomic(fs, items_path(prefix), encode_table(table, 2**16))
    return {"key": row["key"], "items": count, "bytes": done}


def _stage_item(item: Item, cfg: IngestConfig, parts: _Parts) -> list[dict[str, Any]]:
    """Does one item; returns its rows for the list of items."""
    rows: list[dict[str, Any]] = []
    losses: list[Loss] = []
    problem = item.problem
    if problem is None:
        try:
            for row in _prepare(item, cfg, losses):
                rows.append(_stage_row(row, len(rows), item, cfg, parts))
        except (ImageError, VideoError) as error:
            problem = (error.reason, error.detail)
    if problem is not None:  # what came before it is kept
        losses = [problem]
    numbers = [NO_ROW] * len(losses) if rows else [0] * len(losses)
    for number, (reason, text) in zip(numbers, losses, strict=True):
        # Addresses of objects differ from run to run, and the quarantine must not.
        detail = re.sub(r" at 0x[0-9a-f]+", "", text)
        refusal = {"source_uri": item.uri, "reason": reason, "detail": detail}
        rows.append({"segment": number, **refusal})
    return rows


def _prepare(item: Item, cfg: IngestConfig, losses: list[Loss]) -> Iterator[dict[str, Any]]:
    """Yields the rows an item becomes: one of an image, any number of a video."""
    if cfg.modality == "video":
        yield from prepare_video(item, cfg, losses)
        return
    prepared = prepare_image(item.data, cfg)
    yield {
        "sample_id": hash_bytes(item.data),
        "image": prepared.data,
        "height": prepared.height,
        "width": prepared.width,
        "moments": prepared.moments,
        "notes": prepared.notes,
    }


def _stage_row(
    row: dict[str, Any], number: int, item: Item, cfg: IngestConfig, parts: _Parts
) -> dict[str, Any]:
    label = {
        "label_index": item.label if isinstance(item.label, int) else None,
        "label_name": item.label if isinstance(item.label, str) else None,
    }
    return {
        "segment": number,
        "sample_id": row["sample_id"],
        "size": len(row[cfg.modality]),
        "num_frames": row.get("num_frames"),
        "part": parts.add({**row, "source_uri": item.uri, **label}),
        "notes": row.get("notes"),
        **label,
    }


def read_items(fs: Any, prefix: str) -> pa.Table:
    """Returns the items of a finished chunk, in source order (`ITEMS_SCHEMA`)."""
    return pq.read_table(io.BytesIO(fs.cat_file(items_path(prefix))))
