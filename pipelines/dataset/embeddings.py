"""The files of embeddings: which row groups each holds, and its columns.

Shape suffixes: N rows, T patches, D feature width.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.dataset.shards import Manifest

FILE_ROWS = (1024, 8192)
"""A file has a 32nd of the rows of the data set, within these bounds and `FILE_BYTES`."""
FILE_BYTES = 268_435_456


@dataclasses.dataclass(frozen=True)
class Part:
    """One output file, made from a run of row groups."""

    file: str
    groups: tuple[tuple[str, int], ...]
    """(shard file, row group) in order."""
    rows: int


def plan_parts(manifest: Manifest, record: dict[str, Any]) -> list[Part]:
    """Divides the row groups of a data set into output files, independently of the workers."""
    growing = manifest.live is not None
    share = FILE_ROWS[1] if growing else -(-manifest.num_samples // 32)
    most = min(max(share, FILE_ROWS[0]), FILE_ROWS[1])
    most = min(most, FILE_BYTES // (4 * int(np.prod(record["shape"]))))
    parts: list[Part] = []
    groups: list[tuple[str, int]] = []
    rows, shard = 0, ""
    row_groups = [*manifest.row_groups(), None]
    for entry in row_groups:
        other = growing and entry is not None and manifest.shards[entry[0]].file != shard
        if groups and (entry is None or other or rows + entry[2] > most):
            place = f"{len(parts):05d}"
            if growing:
                place = f"{shard.removeprefix('part-').removesuffix('.parquet')}-{groups[0][1]:05d}"
            file = f"part-{record['key']}-{place}.parquet"
            parts.append(Part(file, tuple(groups), rows))
            groups, rows = [], 0
        if entry is not None:
            shard = manifest.shards[entry[0]].file
            groups.append((shard, entry[1]))
            rows += entry[2]
    return parts


def to_parquet(rows: pa.Table, features: np.ndarray, grids_N2: np.ndarray | None = None) -> bytes:
    """Joins row data and their embeddings, [N, D] or [N, T, D], into one Parquet file.

    The shape of one embedding stands in the metadata of its field.

    Args:
        rows: the rows.
        features: float32; NaN where a picture has no token.
        grids_N2: rows and columns of each picture's grid, if pictures may have fewer tokens than
            the encoder; each then has a list of its own tokens and their numbers.
    """
    features = np.ascontiguousarray(features, dtype=np.float32)
    table = rows.combine_chunks()
    if grids_N2 is None:
        shape = list(features.shape[1:])
        values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), math.prod(shape))
        table = _with_column(table, 1, "embedding", values, shape)
    else:
        there_NT = np.isfinite(features[..., 0])
        starts = np.concatenate([[0], np.cumsum(there_NT.sum(1))])
        width, flat = features.shape[-1], pa.array(features[there_NT].reshape(-1))
        values = pa.LargeListArray.from_arrays(pa.array(starts * width), flat)
        table = _with_column(table, 1, "embedding", values, [None, width])
        numbers = pa.array(np.nonzero(there_NT)[1].astype(np.int32))
        tokens = pa.ListArray.from_arrays(pa.array(starts.astype(np.int32)), numbers)
        table = _with_column(table, 2, "tokens", tokens)
        grids = pa.array(grids_N2.astype(np.int32).reshape(-1))
        table = _with_column(table, 3, "grid", pa.FixedSizeListArray.from_arrays(grids, 2))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="ZSTD", use_dictionary=False, write_statistics=False)
    return bytes(sink.getvalue())


def _with_column(
    table: pa.Table, place: int, name: str, values: Any, shape: list[int | None] | None = None
) -> pa.Table:
    metadata = None if shape is None else {"shape": json.dumps(shape)}
    return table.add_column(place, pa.field(name, values.type, False, metadata), values)
