"""Stage 2 of ingest: drops duplicates, plans the shards, and writes them, one Ray task each.

Array suffixes: N good rows (images or segments) in source order, K those kept.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.config.ingest import IngestConfig
from pipelines.dataset.shards import (
    SCHEMAS,
    Shard,
    hash_bytes,
    sample_ids_array,
    write_shard,
)
from pipelines.ingestion.staging import STAGING, part_path, staged_schema
from pipelines.runtime.names import composed
from pipelines.runtime.uris import open_uri, write_atomic

MOST_UNUSED = 2**16  # classes without an example, before integers are taken for names


@dataclass(frozen=True)
class Classes:
    """Maps labels to class indices.

    Attributes:
        names: class names by index.
        by_name: integers too are looked up in `names`; otherwise they are indices already.
        index_names: what integers are called where they are looked up; their digits beyond its end.
    """

    names: tuple[str, ...]
    by_name: bool
    index_names: tuple[str, ...] = ()


def choose_classes(
    tables: Sequence[pa.Table], declared: tuple[str, ...], fixed: tuple[str, ...] = ()
) -> Classes:
    """Decides the list of classes from all labels.

    If the source declares names, integers are indices into them, and indices and names that it does
    not declare come after them. Otherwise all labels are names, in sorted order, as soon as one of
    them is a name, or when integers are far larger than the number of different ones. Names that
    differ only in how their accents are composed are one class.

    Args:
        tables: items of all chunks, `label_index` and `label_name`.
        declared: class names the source declares, or nothing.
        fixed: the class names the user wants; other labels are left out. Integers are what
            `declared` calls them, else one of these names, or where none is an integer the index of
            one.
    """
    if fixed:
        digits = any(name.isdecimal() for name in fixed)
        return Classes(fixed, True, declared or (() if digits else fixed))
    names: set[str] = set()
    indices: set[int] = set()
    for table in tables:
        names.update(table["label_name"].unique().drop_null().to_pylist())
        indices.update(table["label_index"].unique().drop_null().to_pylist())
    count = max(indices, default=-1) + 1
    too_large = count > MOST_UNUSED + 2 * len(indices)
    if declared and not too_large:
        known = (*declared, *(str(index) for index in range(len(declared), count)))
        return Classes((*known, *sorted(_one_spelling(names, known))), False)
    if names:
        return Classes(
            tuple(sorted(_one_spelling(names | {str(index) for index in indices}))), True
        )
    if too_large:
        return Classes(tuple(str(index) for index in sorted(indices)), True)
    return Classes(tuple(str(index) for index in range(count)), False)


def _one_spelling(names: Iterable[str], known: Iterable[str] = ()) -> list[str]:
    """Returns names that are not `known`, in NFC where there are several spellings."""
    spellings: dict[str, list[str]] = {}
    for name in names:
        spellings.setdefault(composed(name), []).append(name)
    for name in known:
        spellings.pop(composed(name), None)
    return [found[0] if len(found) == 1 else name for name, found in spellings.items()]


def first_occurrences(ids_N16: np.ndarray) -> np.ndarray:
    """Returns a bool array [N]: True for the first row with an id, False for later ones.

    Args:
        ids_N16: uint8 [N, 16].
    """
    halves = np.ascontiguousarray(ids_N16).view(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal ids stay in source order
    equal = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    keep_N = np.ones(len(ids_N16), bool)
    keep_N[order[1:][equal]] = False
    return keep_N


@dataclass(frozen=True)
class Index:
    """All good rows in source order, without their images or videos.

    Attributes:
        keys: staging key of each chunk that has good rows.
        parts: rows in each staging part, by chunk.
        starts: position of the first row of each chunk, and of the end.
        labels_N: `label_index` and `label_name` of each row.
        ids_N16: sample ids.
        sizes_N: bytes of the encoded image or segment.
        frames_N: frames of the segment; 0 for images.
        firsts_N: True for the first row of an item.
    """

    keys: list[str]
    parts: list[list[int]]
    starts: np.ndarray
    labels_N: pa.Table
    ids_N16: np.ndarray
    sizes_N: np.ndarray
    frames_N: np.ndarray
    firsts_N: np.ndarray


def build_index(keys: Sequence[str], tables: Sequence[pa.Table]) -> Index:
    """Gathers the good rows of all chunks.

    Args:
        keys: staging key of each chunk.
        tables: items of each chunk (`staging.ITEMS_SCHEMA`).
    """
    filtered = [table.filter(table["reason"].is_null()) for table in tables]
    good = [(key, table) for key, table in zip(keys, filtered, strict=True) if table.num_rows]
    return Index(
        keys=[key for key, _ in good],
        parts=[np.bincount(table["part"].to_numpy()).tolist() for _, table in good],
        starts=np.cumsum([0] + [table.num_rows for _, table in good]),
        labels_N=pa.concat_tables([t.select(["label_index", "label_name"]) for _, t in good]),
        ids_N16=np.concatenate([sample_ids_array(table) for _, table in good]),
        sizes_N=np.concatenate([table["size"].to_numpy() for _, table in good]),
        frames_N=np.concatenate([pc.fill_null(t["num_frames"], 0).to_numpy() for _, t in good]),
        firsts_N=np.concatenate([table["segment"].to_numpy() == 0 for _, table in good]),
    )


def plan_shards(index: Index, keep_N: np.ndarray, classes: Classes, cfg: IngestConfig) -> list[str]:
    """Cuts the kept rows into shards of whole row groups and about `cfg.shard_bytes`.

    Returns:
        One plan for each shard, as JSON. It travels to the task, and the result is named after it.
    """
    kept_K = np.flatnonzero(keep_N)
    labels_K = _labels(index.labels_N.take(kept_K), classes)
    firsts = np.arange(0, len(kept_K), cfg.row_group_rows)
    group_bytes = np.add.reduceat(index.sizes_N[kept_K], firsts)
    cuts, size = [0], 0
    for group, bytes_ in enumerate(group_bytes.tolist()):
        if size and size + bytes_ > cfg.shard_bytes:
            cuts.append(group * cfg.row_group_rows)
            size = 0
        size += bytes_
    cuts.append(len(kept_K))
    plans = []
    for start, stop in itertools.pairwise(cuts):
        segments = _segments(index, keep_N, int(kept_K[start]), int(kept_K[stop - 1]) + 1)
        labels = labels_K.slice(start, stop - start).to_pylist()
        plan = {"rows": stop - start, "segments": segments, "labels": labels}
        plans.append(json.dumps({**plan, "row_group_rows": cfg.row_group_rows}, sort_keys=True))
    return plans


def _labels(labels: pa.Table, classes: Classes) -> pa.Array:
    """Returns class indices (int32, null where unlabelled) of `label_index` and `label_name`."""
    if classes.by_name:
        return _places(_label_names(labels, classes), classes).combine_chunks()
    by_name = _places(labels["label_name"], classes)
    return pc.coalesce(by_name, labels["label_index"]).combine_chunks()


def _places(names: pa.ChunkedArray, classes: Classes) -> pa.ChunkedArray:
    """Returns the class index of each name, or null."""
    values = pa.array(classes.names, pa.string())
    exact = pc.index_in(names, value_set=values)
    if exact.null_count == names.null_count:
        return exact
    same = pc.index_in(
        pc.utf8_normalize(names, form="NFC"), value_set=pc.utf8_normalize(values, form="NFC")
    )
    return pc.coalesce(exact, same)


def _label_names(labels: pa.Table, classes: Classes) -> pa.ChunkedArray:
    indices = labels["label_index"]
    known = pc.less(indices, len(classes.index_names))
    called = pa.array(classes.index_names, pa.string()).take(pc.if_else(known, indices, None))
    return pc.coalesce(labels["label_name"], called, pc.cast(indices, pa.string()))


def labels_left_out(index: Index, keep_N: np.ndarray, classes: Classes) -> Counter[str]:
    """Returns the labels of kept rows that are not classes, with their number of rows."""
    labels = index.labels_N.filter(pa.array(keep_N & index.firsts_N))
    names = _label_names(labels, classes)
    outside = _places(names, classes).is_null()
    return Counter(names.filter(pc.and_(outside, names.is_valid())).to_pylist())


def _segments(index: Index, keep_N: np.ndarray, start: int, stop: int) -> list[dict[str, Any]]:
    """Returns rows [start, stop) by chunk: rows of the chunk, and which of them are dropped."""
    segments = []
    first = int(np.searchsorted(index.starts, start, side="right")) - 1
    for chunk in range(first, len(index.keys)):
        origin = int(index.starts[chunk])
        low, high = max(start, origin), min(stop, int(index.starts[chunk + 1]))
        if low >= high:
            break
        drop = (np.flatnonzero(~keep_N[low:high]) + low - origin).tolist()
        segments.append(
            {
                "key": index.keys[chunk],
                "parts": index.parts[chunk],
                "rows": [low - origin, high - origin],
                "drop": drop,
            }
        )
    return segments


def marker_path(root: str, plan: str) -> str:
    """Returns the path of the note about a finished shard."""
    return f"{root}/{STAGING}/shard-{hash_bytes(plan.encode()).hex()}.json"


def merge_shard(row: dict[str, Any], cfg: IngestConfig) -> dict[str, Any]:
    """Writes one shard from staging parts (a Ray Data `map` function).

    Args:
        row: `plan` (JSON).
        cfg: the ingest configuration.

    Returns:
        `items` and `bytes` done, for the progress bar. The result is written to `marker_path`.
    """
    fs, root = open_uri(cfg.out)
    plan = json.loads(row["plan"])
    staged = pa.concat_tables(
        [_read_segment(fs, root, segment, cfg.modality) for segment in plan["segments"]]
    )
    assert staged.num_rows == plan["rows"], f"{staged.num_rows} rows, planned {plan['rows']}"
    moments = np.asarray(staged["moments"].combine_chunks().flatten()).reshape(-1, 6)
    names = SCHEMAS[cfg.modality].names
    labels = pa.array(plan["labels"], pa.int32())
    columns = [labels if name == "label" else staged[name] for name in names]
    table = pa.Table.from_arrays(columns, names)
    shard = write_shard(fs, root, table, plan["row_group_rows"])
    note = {"shard": dataclasses.asdict(shard), "moments": moments.sum(axis=0).tolist()}
    write_atomic(fs, marker_path(root, row["plan"]), json.dumps(note).encode())
    return {"items": shard.rows, "bytes": shard.bytes}


def _read_segment(fs: Any, root: str, segment: dict[str, Any], modality: str) -> pa.Table:
    start, stop = segment["rows"]
    columns = staged_schema(modality).names
    tables, first = [], 0
    for number, rows in enumerate(segment["parts"]):
        if first < stop and first + rows > start:
            path = part_path(f"{root}/{STAGING}/{segment['key']}", number)
            part = pq.read_table(io.BytesIO(fs.cat_file(path)), columns=columns)
            low = max(start - first, 0)
            tables.append(part.slice(low, min(stop - first, rows) - low))
        first += rows
    table = pa.concat_tables(tables)
    if not segment["drop"]:
        return table
    keep = np.ones(stop - start, bool)
    keep[np.array(segment["drop"]) - start] = False
    return table.filter(pa.array(keep))


def read_shard_note(fs: Any, root: str, plan: str) -> tuple[Shard, list[float]]:
    """Returns the finished shard of a plan, and the sums of its samples' moments.

    Raises:
        FileNotFoundError: it is not finished.
    """
    note = json.loads(fs.cat_file(marker_path(root, plan)))
    shard = {**note["shard"], "row_groups": tuple(note["shard"]["row_groups"])}
    return Shard(**shard), note["moments"]
