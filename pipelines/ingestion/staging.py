"""Stage 1 of ingest, one Ray task a chunk: reads, validates, hashes and re-encodes its items.

    OUT/_staging/<key>-<n>.parquet      rows ready for a shard, about 64 MiB a part
    OUT/_staging/<key>.items.parquet    one row for each row, refused item or loss; it is
                                        written last, so its presence means "done"

Labels are stored only in the list of items, because those of a tar may not be known before its end.

`<key>` is a hash of the chunk and of every setting that affects its rows. A killed ingest finds its
finished chunks by these names. Their content depends only on the settings and the source.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.media.pictures.errors import ImageError
from models.media.video.containers import VideoError
from models.media.video.video_reader import Loss
from pipelines.config.ingest import LABEL_COLUMN, IngestConfig
from pipelines.dataset.shards import SCHEMAS, encode_table, hash_bytes
from pipelines.ingestion.entries.chunks import chunk_from_json
from pipelines.ingestion.preparing.images import prepare_image
from pipelines.ingestion.preparing.videos import prepare_video
from pipelines.ingestion.reading.items import Item, Problem, Tally
from pipelines.ingestion.reading.labels import Label
from pipelines.ingestion.sources.registry import read_chunk, source_type
from pipelines.runtime.names import escaped
from pipelines.runtime.uris import open_uri, write_atomic

VERSION = 2  # raise it when the same input would give other rows; source types have their own
PART_BYTES = 64 * 2**20
STAGING = "_staging"

ITEMS_SCHEMA = pa.schema(
    [
        # Place of the row among those of its item, from 0; NO_ROW for what is missing of an item.
        ("segment", pa.int32()),
        ("sample_id", pa.binary(16)),  # null for a refused item, like all down to label_name
        ("size", pa.int64()),
        ("num_frames", pa.int32()),
        ("part", pa.int32()),
        ("label_index", pa.int32()),
        ("label_name", pa.string()),
        ("source_uri", pa.string()),  # null for a good one, like all down from here
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
NO_ROW = -1
_TALLY = b"rayjepa.tally"  # in the schema's metadata

# Settings that affect where files are or how rows are packed, but not the rows themselves.
_NOT_CONTENT = (
    *("source", "out", "format", "shard_bytes", "row_group_rows", "follow", "live"),
    *("class_level", "classes"),  # labels are part of the chunk; indices are assigned at the end
)
# Settings that do not affect items of this modality.
_NOT_OF = {
    "image": ("video",),
    "video": (
        *("image_column", "label_column", "image_member", "encode", "quality", "max_pixels"),
        *("background", "deep_range"),
    ),
}
# Settings that were added later: while they are not used, the keys of older results stay valid.
_ADDED = ("image_member",)


def chunk_key(chunk: str, cfg: IngestConfig) -> str:
    """Returns 32 hex digits naming the result of a chunk, given as JSON."""
    values = dataclasses.asdict(cfg) | {"label_column": cfg.label_column or LABEL_COLUMN}
    unused = [name for name in _ADDED if not values[name]]
    without = (*_NOT_CONTENT, *_NOT_OF[cfg.modality], *unused)
    settings = {name: value for name, value in values.items() if name not in without}
    version = source_type(chunk_from_json(chunk).kind).version
    content = [VERSION, settings, chunk, *([version] if version else [])]
    return hash_bytes(json.dumps(content, sort_keys=True).encode()).hex()


def staged_schema(modality: str) -> pa.Schema:
    """Returns the columns of staging parts: a shard's without the label, and moments."""
    fields = [field for field in SCHEMAS[modality] if field.name != "label"]
    # Means of pixels and of squared pixels, RGB each, of pixels in [0, 1].
    return pa.schema([*fields, pa.field("moments", pa.list_(pa.float64(), 6))])


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
            write_atomic(self._fs, path, encode_table(table, 64))
            self._rows, self._bytes, self.number = [], 0, self.number + 1


def part_path(prefix: str, number: int) -> str:
    """Returns where part `number` of the chunk at `prefix` lies."""
    return f"{prefix}-{number}.parquet"


def items_path(prefix: str) -> str:
    """Returns where the list of the chunk's items lies; its presence means the chunk is done."""
    return f"{prefix}.items.parquet"


def stage_chunk(row: dict[str, Any], cfg: IngestConfig) -> dict[str, Any]:
    """Stages one chunk (a Ray Data `map` function).

    Args:
        row: `chunk` (JSON) and `key`.
        cfg: the ingest configuration.

    Returns:
        `key`, `items` and `bytes` done, for the progress bar.
    """
    fs, root = open_uri(cfg.out)
    prefix = f"{root}/{STAGING}/{row['key']}"
    parts = _Parts(fs, prefix, cfg.modality)
    items: list[dict[str, Any]] = []
    firsts: list[int] = []  # where the rows of each item begin
    tally, done = Tally(), 0
    for item in read_chunk(chunk_from_json(row["chunk"]), cfg, tally):
        firsts.append(len(items))
        items += _stage_item(item, cfg, parts)
        done += item.num_bytes
    parts.flush()
    tally.notes.update(note for row in items for note in row.get("notes", ()))
    for number, (label, problem) in tally.labels.items():
        items += _set_label(items[firsts[number]], label, problem)
    found = json.dumps({"ignored": tally.ignored, "notes": tally.notes}).encode()
    table = pa.Table.from_pylist(items, ITEMS_SCHEMA.with_metadata({_TALLY: found}))
    write_atomic(fs, items_path(prefix), encode_table(table, 2**16))
    return {"key": row["key"], "items": len(firsts), "bytes": done}


def _set_label(row: dict[str, Any], label: Label, problem: Problem | None) -> list[dict[str, Any]]:
    """Sets the label of an item's row; returns a loss if the label was not understood."""
    if row.get("reason") is not None:
        return []  # a refused item needs no label
    row["label_index"] = label if isinstance(label, int) else None
    row["label_name"] = escaped(label) if isinstance(label, str) else None
    return [_refusal(row["uri"], NO_ROW, problem)] if problem else []


def _refusal(uri: str, number: int, problem: Problem) -> dict[str, Any]:
    reason, text = problem
    # Addresses of objects differ from run to run, and the quarantine must not.
    detail = escaped(re.sub(r" at 0x[0-9a-f]+", "", text))
    return {"segment": number, "source_uri": escaped(uri), "reason": reason, "detail": detail}


def _stage_item(item: Item, cfg: IngestConfig, parts: _Parts) -> list[dict[str, Any]]:
    """Stages one item; returns its rows for the list of items."""
    rows: list[dict[str, Any]] = []
    losses: list[Loss] = []
    problem = item.problem
    if problem is None:
        try:
            for row in _prepare(item, cfg, losses):
                rows.append(_stage_row(row, len(rows), item, cfg, parts))
        except (ImageError, VideoError) as error:
            problem = (error.reason, error.detail)
    if problem is not None:  # rows before the problem are kept
        losses = [problem]
    numbers = [NO_ROW] * len(losses) if rows else [0] * len(losses)
    refusals = [_refusal(item.uri, *loss) for loss in zip(numbers, losses, strict=True)]
    labels = [loss for row in rows for loss in _set_label(row, item.label, item.label_problem)]
    return [*rows, *refusals, *labels]


def _prepare(item: Item, cfg: IngestConfig, losses: list[Loss]) -> Iterator[dict[str, Any]]:
    """Yields the rows of an item: one for an image, any number for a video."""
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
    return {
        "segment": number,
        "sample_id": row["sample_id"],
        "size": len(row[cfg.modality]),
        "num_frames": row.get("num_frames"),
        "part": parts.add({**row, "source_uri": escaped(item.uri)}),
        "uri": item.uri,  # for losses found later; not stored
        "notes": row.get("notes", ()),  # not stored either
    }


def read_items(fs: Any, prefix: str) -> pa.Table:
    """Returns the items of a finished chunk, in source order (`ITEMS_SCHEMA`)."""
    return pq.read_table(io.BytesIO(fs.cat_file(items_path(prefix))))


def read_tally(items: pa.Table) -> Tally:
    """Returns what was found besides the items of a finished chunk."""
    found = json.loads((items.schema.metadata or {}).get(_TALLY, b"{}"))
    return Tally({}, Counter(found.get("ignored", {})), Counter(found.get("notes", {})))
