"""Stage 1 of ingest, one Ray task a chunk: read, validate, hash, re-encode, write staging parts.

    OUT/_staging/<key>-<n>.parquet      rows ready for a shard, about 64 MiB a part
    OUT/_staging/<key>.items.parquet    one row per source item; written last, so it means "done"

`<key>` hashes the chunk and every setting that shapes its rows. A killed ingest finds its finished
chunks by these names, and nothing but the settings and the source decides what is in them.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from models.images import ImageError, decode_image, open_image
from pipelines.config import IngestConfig
from pipelines.readers import Item, read_chunk
from pipelines.shards import encode_table, hash_bytes, open_shards, put_atomic
from pipelines.sources import Chunk, Entry

VERSION = 1  # raise it when the same input would give other rows
PART_BYTES = 64 * 2**20
STAGING = "_staging"

STAGED_SCHEMA = pa.schema(
    [
        ("sample_id", pa.binary(16)),
        ("image", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("label_index", pa.int32()),
        ("label_name", pa.string()),
        ("source_uri", pa.string()),
        # Means of pixels and of squared pixels, RGB each, of pixels in [0, 1].
        ("moments", pa.list_(pa.float64(), 6)),
    ]
)
ITEMS_SCHEMA = pa.schema(
    [
        ("sample_id", pa.binary(16)),  # null for a refused item, like all down to label_name
        ("size", pa.int64()),
        ("part", pa.int32()),
        ("label_index", pa.int32()),
        ("label_name", pa.string()),
        ("source_uri", pa.string()),  # null for a good one, like all down from here
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

# Settings that say where things are or how rows are packed, not what is in a row.
_NOT_CONTENT = ("source", "out", "format", "shard_bytes", "row_group_rows")
_FORMATS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}
_EXIF_TRACES = (b"Exif", b"eXIf", b"EXIF", b"profile type exif", b"Orientation")
_LEVELS = np.arange(256, dtype=np.int64)
_POWERS = np.stack([_LEVELS, _LEVELS**2], axis=1)


@dataclass(frozen=True, slots=True)
class Prepared:
    """One validated image, as it will be stored."""

    data: bytes
    height: int
    width: int
    moments: list[float]


def prepare_image(data: bytes, cfg: IngestConfig) -> Prepared:
    """Validates an encoded image by decoding all of it, and re-encodes it where `cfg` asks for it.

    Raises:
        ImageError: the image is refused, with the reason.
    """
    if len(data) > cfg.max_bytes:
        raise ImageError("too_many_bytes", f"{len(data)} is over the limit of {cfg.max_bytes}")
    header = open_image(data, max_pixels=cfg.max_pixels)
    size = _target_size(header.width, header.height, cfg.short_side)
    resized = size != header.size
    image = decode_image(
        data, max_pixels=cfg.max_pixels, draft=(2 * size[0], 2 * size[1]) if resized else None
    )
    if resized:
        target = _target_size(image.width, image.height, cfg.short_side)
        image = image.resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)
    source_format = _FORMATS.get(header.format or "")
    target_format = source_format or "png" if cfg.encode == "keep" else cfg.encode
    if resized or source_format != target_format or not _is_plain(header, data):
        data = _encode(image, target_format, cfg.quality)
    return Prepared(data, image.height, image.width, _moments(image))


def _target_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    short = min(width, height)
    if short_side is None or short <= short_side:
        return width, height
    return round(width * short_side / short), round(height * short_side / short)


def _is_plain(header: Image.Image, data: bytes) -> bool:
    """True when any decoder gets the right picture: 8-bit RGB or grey, upright, a single frame."""
    if header.mode not in ("RGB", "L") or "transparency" in header.info:
        return False
    if header.format == "PNG" and data[24] == 16:  # bits a channel; Pillow makes 8 of them
        return False
    if header.format != "MPO" and getattr(header, "is_animated", False):
        return False
    # Asking for EXIF data decodes a whole PNG, so look for traces of it in the bytes first.
    if not any(trace in data for trace in _EXIF_TRACES):
        return True
    return bool(header.getexif().get(0x0112, 1) == 1)  # the orientation tag


def _encode(image: Image.Image, target: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    options = {} if target == "png" else {"quality": quality}
    try:
        image.save(buffer, target, **options)
    except (OSError, ValueError) as error:  # larger than the format can hold
        raise ImageError("encode_error", f"{type(error).__name__}: {error}") from error
    return buffer.getvalue()


def _moments(image: Image.Image) -> list[float]:
    """Returns the RGB means of pixels, then of squared pixels, exact up to the last division."""
    counts = np.array(image.histogram(), dtype=np.int64).reshape(3, 256)
    sums = counts @ _POWERS
    pixels = image.width * image.height
    return (sums / (pixels * np.array([255, 255 * 255]))).T.ravel().tolist()  # type: ignore[no-any-return]


def chunk_key(chunk: str, cfg: IngestConfig) -> str:
    """Returns 32 hex digits naming the result of a chunk, given as JSON."""
    settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in _NOT_CONTENT}
    return hash_bytes(json.dumps([VERSION, settings, chunk], sort_keys=True).encode()).hex()


def chunk_to_json(chunk: Chunk) -> str:
    """Returns `chunk` as text: what travels to the task."""
    entries = [(e.path, e.size, e.tag, e.label) for e in chunk.entries]
    return json.dumps([chunk.kind, chunk.protocol, entries, chunk.row_groups, chunk.rows])


def chunk_from_json(text: str) -> Chunk:
    """Rebuilds a chunk from `chunk_to_json`'s text."""
    kind, protocol, entries, (start, stop), (first, last) = json.loads(text)
    files = tuple(Entry(*entry) for entry in entries)
    return Chunk(kind, protocol, files, (start, stop), (first, last))


class _Parts:
    """Collects rows and writes them out as numbered parts of about `PART_BYTES`."""

    def __init__(self, fs: Any, prefix: str) -> None:
        self._fs, self._prefix = fs, prefix
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self.number = 0

    def add(self, row: dict[str, Any]) -> int:
        """Takes a row and returns the number of the part it will be in."""
        number = self.number
        self._rows.append(row)
        self._bytes += len(row["image"])
        if self._bytes >= PART_BYTES:
            self.flush()
        return number

    def flush(self) -> None:
        if self._rows:
            table = pa.Table.from_pylist(self._rows, STAGED_SCHEMA)
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
    parts = _Parts(fs, prefix)
    items: list[dict[str, Any]] = []
    done = 0
    for item in read_chunk(chunk_from_json(row["chunk"]), cfg):
        items.append(_stage_item(item, cfg, parts))
        done += len(item.data)
    parts.flush()
    table = pa.Table.from_pylist(items, ITEMS_SCHEMA)
    put_atomic(fs, items_path(prefix), encode_table(table, 2**16))
    return {"key": row["key"], "items": len(items), "bytes": done}


def _stage_item(item: Item, cfg: IngestConfig, parts: _Parts) -> dict[str, Any]:
    problem, prepared = item.problem, None
    if problem is None:
        try:
            prepared = prepare_image(item.data, cfg)
        except ImageError as error:
            problem = (error.reason, error.detail)
    if prepared is None:
        reason, detail = problem or ("", "")
        # Addresses of objects differ from run to run, and the quarantine must not.
        detail = re.sub(r" at 0x[0-9a-f]+", "", detail)
        return {"source_uri": item.uri, "reason": reason, "detail": detail}
    identity = hash_bytes(item.data)
    label = {
        "label_index": item.label if isinstance(item.label, int) else None,
        "label_name": item.label if isinstance(item.label, str) else None,
    }
    part = parts.add(
        {
            "sample_id": identity,
            "image": prepared.data,
            "height": prepared.height,
            "width": prepared.width,
            "source_uri": item.uri,
            "moments": prepared.moments,
            **label,
        }
    )
    return {"sample_id": identity, "size": len(prepared.data), "part": part, **label}


def read_items(fs: Any, prefix: str) -> pa.Table:
    """Returns the items of a finished chunk, in source order (`ITEMS_SCHEMA`)."""
    return pq.read_table(io.BytesIO(fs.cat_file(items_path(prefix))))
