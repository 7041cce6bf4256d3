"""The on-disk contract between ingest and everything after it: Parquet shards and their manifest.

    OUT/manifest.json          written last: a folder without it is not a data set
    OUT/part-<16 hex>.parquet  named by content; row groups are the smallest unit a loader reads
    OUT/quarantine.parquet     what ingest refused, and why
    OUT/losses.parquet         what is missing from items that were kept in part, and why

A set that grows (live_set.py) follows the same contract: shards are added but never changed or
removed, and every manifest describes a complete data set.

A manifest names its shards in order; that order, and the order of rows inside them, is the order of
the data set. docs/data.md describes every field.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.dataset.row_groups import read_row_group
from pipelines.runtime.uris import open_uri, write_atomic

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.parquet"
LOSSES = "losses.parquet"

IMAGE_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.binary(16), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("source_uri", pa.string(), nullable=False),
    ]
)
VIDEO_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.binary(16), nullable=False),
        pa.field("video", pa.binary(), nullable=False),
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("fps", pa.float64(), nullable=False),
        pa.field("start_s", pa.float64(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("actions", pa.list_(pa.list_(pa.float32()))),  # a vector a frame
        pa.field("states", pa.list_(pa.list_(pa.float32()))),
    ]
)
# Of live streams: when a segment's first frame arrived.
LIVE_SCHEMA = VIDEO_SCHEMA.append(
    pa.field("recorded_at", pa.timestamp("us", tz="UTC"), nullable=False)
)
# By modality, which is also the name of the column of encoded bytes.
SCHEMAS = {"image": IMAGE_SCHEMA, "video": VIDEO_SCHEMA}
# Names of shards and of partly written files; only `write_shard` and `write_atomic` make them.
SHARD_NAME = re.compile(r"part-[0-9a-f]{16}\.parquet")
_PARTIAL = re.compile(r"\.(part-[0-9a-f]{16}\.parquet|manifest\.json)\.\d+\.tmp")
QUARANTINE_SCHEMA = pa.schema(
    [("source_uri", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file of a data set.

    Attributes:
        file: name inside the folder.
        rows: samples in it.
        bytes: size of the file.
        blake2b: 128-bit hash of the file, hex.
        row_groups: rows of each row group, in order.
    """

    file: str
    rows: int
    bytes: int
    blake2b: str
    row_groups: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a data set holds.

    Attributes:
        schema_version: of the shards' columns and of this file.
        modality: "image" or "video"; one sample is an image or a segment of a video.
        classes: class names by label index; empty when unlabelled.
        num_samples: rows of all shards.
        num_bytes: bytes of all encoded images or segments.
        num_frames: frames of all segments; None for images.
        shards: in the order of the data set.
        mean: RGB channel means of pixels in [0, 1]; every sample weighs the same.
        std: RGB channel standard deviations, likewise.
        quarantined: number of refused source items by reason.
        duplicates: source items dropped because an earlier one had the same bytes.
        losses: number of losses by reason, in items that were kept in part: videos, and images
            whose label was not understood.
        ignored: number of members of archives that are not images, by kind.
        notes: number of further observations on the ingested items, by kind.
        ingest: the ingest configuration, without its `out`.
        fingerprint: hash of that configuration and of the source listing.
        live: for a set recorded from live streams, its `live_set.Progress`; else None.
    """

    schema_version: int = SCHEMA_VERSION
    modality: str = "image"
    classes: tuple[str, ...] = ()
    num_samples: int
    num_bytes: int
    num_frames: int | None = None
    shards: tuple[Shard, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    quarantined: dict[str, int]
    duplicates: int
    losses: dict[str, int] = dataclasses.field(default_factory=dict)
    ignored: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: dict[str, int] = dataclasses.field(default_factory=dict)
    ingest: dict[str, Any]
    fingerprint: str
    live: dict[str, Any] | None = None

    @property
    def manifest_hash(self) -> str:
        """32 hex digits that change whenever a reader would see other data or another order."""
        content = {
            "schema_version": self.schema_version,
            "modality": self.modality,
            "classes": self.classes,
            "shards": [vars(shard) for shard in self.shards],
        }
        return hash_bytes(json.dumps(content, sort_keys=True).encode()).hex()

    def row_groups(self) -> list[tuple[int, int, int]]:
        """Returns (shard index, row group index in the shard, rows) of all row groups, in order."""
        return [
            (s, g, rows)
            for s, shard in enumerate(self.shards)
            for g, rows in enumerate(shard.row_groups)
        ]

    def row_group_array(self) -> npt.NDArray[np.int32]:
        """Returns `row_groups` as an array [G, 3], in a tenth of the memory."""
        counts_S = [len(shard.row_groups) for shard in self.shards]
        shard_G = np.repeat(np.arange(len(counts_S), dtype=np.int32), counts_S)
        starts_S = np.cumsum(counts_S, dtype=np.int64) - counts_S
        group_G = np.arange(len(shard_G)) - np.repeat(starts_S, counts_S)
        rows = itertools.chain.from_iterable(shard.row_groups for shard in self.shards)
        rows_G = np.fromiter(rows, np.int32, len(shard_G))
        return np.column_stack([shard_G, group_G.astype(np.int32), rows_G])

    def up_to(self, shards: int) -> Manifest:
        """Returns the set as it was with only its first shards; statistics stay those of all.

        Raises:
            ValueError: there are fewer shards.
        """
        if shards > len(self.shards):
            raise ValueError(f"{shards} shards are to be read, but there are {len(self.shards)}")
        first = self.shards[:shards]
        rows = sum(shard.rows for shard in first)
        return dataclasses.replace(
            self,
            shards=first,
            num_samples=rows,
            num_bytes=round(self.num_bytes * rows / max(1, self.num_samples)),
            num_frames=None,
        )

    def to_json(self) -> str:
        """Returns the text of manifest.json."""
        values = {**vars(self), "shards": [vars(shard) for shard in self.shards]}
        text = json.dumps(values, indent=1, sort_keys=True)
        # Lists of numbers on one line: a large set has thousands of row groups.
        return re.sub(r"\[[\d.,\s]+\]", lambda found: "".join(found[0].split()), text) + "\n"


def hash_bytes(data: bytes) -> bytes:
    """Returns the 16-byte blake2b of `data`: sample ids and checksums."""
    return hashlib.blake2b(data, digest_size=16).digest()


def read_manifest(uri: str | Path) -> Manifest:
    """Reads the manifest of ingested shards.

    Raises:
        ValueError: there is none, it is damaged, or it has another schema version.
    """
    fs, root = open_uri(uri)
    try:
        values = json.loads(fs.cat_file(f"{root}/{MANIFEST}"))
    except FileNotFoundError:
        raise ValueError(f"{uri} has no {MANIFEST}: not ingested, or not finished") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{uri}/{MANIFEST} is damaged: {error}") from error
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(f"{uri} has schema version {version}, this code reads {SCHEMA_VERSION}")
    return _manifest_from(values)


def _manifest_from(values: dict[str, Any]) -> Manifest:
    shards = tuple(
        Shard(**{**shard, "row_groups": tuple(shard["row_groups"])}) for shard in values["shards"]
    )
    tuples = {key: tuple(values[key]) for key in ("classes", "mean", "std")}
    return Manifest(**{**values, **tuples, "shards": shards})


def write_manifest(uri: str | Path, manifest: Manifest) -> None:
    """Publishes the data set: from now on readers see it."""
    fs, root = open_uri(uri)
    write_atomic(fs, f"{root}/{MANIFEST}", manifest.to_json().encode())


def encode_table(table: pa.Table, row_group_rows: int) -> bytes:
    """Returns `table` as one Parquet file, the same bytes for the same rows.

    Encoded images and videos are stored plain: they do not compress, and statistics over them would
    copy whole images into the footer.
    """
    plain = ("sample_id", *SCHEMAS)
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.combine_chunks(),  # pages, too, must not depend on how the rows were gathered
        sink,
        row_group_size=row_group_rows,
        compression={path: "NONE" if path in plain else "ZSTD" for path in _leaves(table.schema)},
        use_dictionary=False,
        write_statistics=False,
    )
    return bytes(sink.getvalue())


def _leaves(schema: pa.Schema) -> list[str]:
    """Returns the Parquet path of every column, down to the elements of lists."""
    paths = []
    for field in schema:
        path, kind = field.name, field.type
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            path, kind = f"{path}.list.element", kind.value_type
        paths.append(path)
    return paths


def write_shard(
    fs: Any, root: str, table: pa.Table, row_group_rows: int, name: str | None = None
) -> Shard:
    """Writes one shard and returns its manifest entry.

    Args:
        fs: file system.
        root: folder in it.
        table: rows of one of `SCHEMAS`, or of `LIVE_SCHEMA`.
        row_group_rows: rows of a row group; only the last one may be shorter.
        name: 16 hex digits for its name, never used before; None names it by its content.
    """
    schema = LIVE_SCHEMA if "recorded_at" in table.column_names else None
    schema = schema or next(schema for key, schema in SCHEMAS.items() if key in table.column_names)
    data = encode_table(table.cast(schema), row_group_rows)
    digest = hash_bytes(data).hex()
    file = f"part-{name or digest[:16]}.parquet"
    write_atomic(fs, f"{root}/{file}", data)
    full, rest = divmod(table.num_rows, row_group_rows)
    groups = (row_group_rows,) * full + ((rest,) if rest else ())
    return Shard(file=file, rows=table.num_rows, bytes=len(data), blake2b=digest, row_groups=groups)


def list_names(uri: str | Path, folder: str = "") -> set[str]:
    """Returns the names in a data set's folder or in one inside it; none if it does not exist."""
    fs, root = open_uri(uri)
    path = f"{root}/{folder}".rstrip("/")
    try:
        return {name.rpartition("/")[2] for name in fs.ls(path, detail=False)}
    except FileNotFoundError:
        return set()


def remove_unnamed(uri: str | Path, shards: Sequence[Shard]) -> None:
    """Removes shards that are not among `shards`, and files that a killed ingest was writing."""
    fs, root = open_uri(uri)
    named = {shard.file for shard in shards}
    for name in sorted(list_names(uri) - named):
        if SHARD_NAME.fullmatch(name) or _PARTIAL.fullmatch(name):
            fs.rm(f"{root}/{name}")


def iter_samples(
    uri: str | Path, columns: Sequence[str] | None = None, limit: int | None = None
) -> Iterator[pa.Table]:
    """Yields the rows in the order of the data set, one table a row group.

    Args:
        uri: folder or `s3://` prefix of the shards.
        columns: columns to read; None for all.
        limit: stop after this many rows. Ingest shuffles the files of a folder by the hash of their
            names, so the first rows are a fair sample of such a source.
    """
    fs, root = open_uri(uri)
    manifest = read_manifest(uri)
    left = manifest.num_samples if limit is None else min(limit, manifest.num_samples)
    for shard, group, rows in manifest.row_groups():
        if left <= 0:
            return
        table = read_row_group(fs, root, manifest.shards[shard].file, group, columns)
        yield table.slice(0, left)
        left -= rows


def read_rows(
    uri: str | Path, limit: int | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Returns the first `limit` rows (all by default) as one table, in data set order."""
    tables = list(iter_samples(uri, columns, limit))
    if tables:
        return pa.concat_tables(tables)
    schema = SCHEMAS[read_manifest(uri).modality]
    fields = [field for field in schema if columns is None or field.name in columns]
    return pa.schema(fields).empty_table()


def sample_ids_array(table: pa.Table) -> np.ndarray:
    """Returns the `sample_id` column as [N, 16] uint8, without a Python object per row."""
    column = table.column("sample_id").combine_chunks()
    start = column.offset * 16
    flat = np.frombuffer(column.buffers()[1], np.uint8)[start : start + 16 * len(column)]
    return flat.reshape(-1, 16)


def verify_shards(uri: str | Path) -> Manifest:
    """Reads every shard in full and compares it with the manifest.

    Returns:
        The manifest.

    Raises:
        ValueError: a shard is missing, or its bytes are not what the manifest says.
    """
    fs, root = open_uri(uri)
    manifest = read_manifest(uri)
    for shard in manifest.shards:
        try:
            data = fs.cat_file(f"{root}/{shard.file}")
        except FileNotFoundError:
            raise ValueError(f"{uri}/{shard.file} is missing") from None
        if hash_bytes(data).hex() != shard.blake2b:
            raise ValueError(f"{uri}/{shard.file} does not match its checksum")
    return manifest
