"""Reads rows of ingested shards: all labelled rows, a random draw of them, or rows by position.

Shape suffixes: N rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias, TypeVar

import numpy as np
import pyarrow as pa

from pipelines.dataset.row_groups import read_row_group
from pipelines.dataset.shards import Manifest, read_manifest
from pipelines.runtime.names import composed
from pipelines.runtime.uris import open_uri

In = TypeVar("In")
Out = TypeVar("Out")

COLUMNS = {
    "image": ("sample_id", "image", "label", "source_uri"),
    "video": ("sample_id", "video", "num_frames", "fps", "label", "source_uri"),
}
PLACE = ("shard", "row_group", "row")
READ_AHEAD = 4
"""Row groups that are read ahead of the decoder, because requests to S3 have a high latency."""

Place: TypeAlias = tuple[int, int, np.ndarray | None]
"""Shard, row group, and rows of it; None for all that are wanted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which rows to read."""

    column: str = "label"
    """Rows with a value in this column."""
    only: int | None = None
    """Only rows of this class index; None for all."""

    def rows_of(self, table: pa.Table) -> np.ndarray:
        """Returns the indices of the rows to read in a table."""
        wanted_N = table[self.column].is_valid().to_numpy()
        if self.only is not None:
            wanted_N = wanted_N & (table_labels(table) == self.only)
        return np.flatnonzero(wanted_N)


LABELLED = Wanted()
EVERY = Wanted(column="sample_id")


def check_classes(sets: Mapping[str, Manifest]) -> None:
    """Refuses labelled sets that a probe cannot compare, as their label indices differ in meaning.

    Args:
        sets: manifests by the flag that names them.

    Raises:
        ValueError: one has no labels, or their classes differ.
    """
    for flag, manifest in sets.items():
        if not manifest.classes:
            raise ValueError(f"{flag}: these shards have no labels, which every probe needs")
    first, second = (manifest.classes for manifest in sets.values())
    if [*map(composed, first)] != [*map(composed, second)]:
        differing = ", ".join(sorted(set(first) ^ set(second))[:6]) or "their order"
        raise ValueError(
            f"{' and '.join(sets)} have different classes: {differing}; ingest the second again "
            "with --classes and the folder of the first"
        )


def load_labelled(uri: str, limit: int | None = None, *, seed: int = 0) -> pa.Table:
    """Reads labelled rows of ingested shards into memory: all, or `limit` of them (all if fewer).

    Those of random row groups, because files are often in class order and a row group is the least
    that can be read; the same ones every time, in file order. Ingest mixes the classes of a
    folder's row groups, not those of tars and Parquet files.

    Returns:
        Table with `COLUMNS`, and `PLACE`: where in the shards each row stands.

    Raises:
        ValueError: no row has a label.
    """
    tables = list(iter_labelled(uri, limit, seed=seed))
    if not sum(table.num_rows for table in tables):
        raise ValueError(f"{uri}: nothing is labelled; probes need shards with labels")
    return pa.concat_tables(tables)


def load_samples(uri: str, limit: int, *, beside: tuple[str, ...] = ()) -> pa.Table:
    """Reads `limit` rows as `load_labelled` does, whether they are labelled or not.

    Args:
        uri: shards.
        limit: most rows.
        beside: further columns, such as `actions`.
    """
    return pa.concat_tables(list(iter_labelled(uri, limit, wanted=EVERY, beside=beside)))


def iter_labelled(
    uri: str,
    limit: int | None = None,
    *,
    seed: int = 0,
    wanted: Wanted = LABELLED,
    beside: tuple[str, ...] = (),
) -> Iterator[pa.Table]:
    """Yields what `load_labelled` returns one row group at a time, for sets larger than memory.

    `wanted` may ask for other rows; the column it names is then in the tables too, as are those of
    `beside`.
    """
    manifest = read_manifest(uri)
    fs, root = open_uri(uri)
    columns = tuple(dict.fromkeys((*COLUMNS[manifest.modality], wanted.column, *beside)))

    def find(group: tuple[int, int, int]) -> Place:
        file = manifest.shards[group[0]].file
        table = read_row_group(fs, root, file, group[1], list({"label", wanted.column}))
        return group[0], group[1], wanted.rows_of(table)

    def read(place: Place) -> pa.Table:
        shard, group, rows = place
        table = read_row_group(fs, root, manifest.shards[shard].file, group, columns)
        if rows is None:
            rows = wanted.rows_of(table)
        stands = (np.full_like(rows, shard), np.full_like(rows, group), rows)
        table = table.take(rows)
        for name, column in zip(PLACE, stands, strict=True):
            table = table.append_column(name, pa.array(column))
        return table

    groups = manifest.row_groups()
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="read") as pool:
        places: list[Place] = [(shard, group, None) for shard, group, _ in groups]
        if limit is not None and limit < manifest.num_samples:
            order = np.random.default_rng(seed).permutation(len(groups))
            drawn = in_order(pool, find, (groups[i] for i in order), READ_AHEAD)
            with contextlib.closing(drawn):
                places = _first_rows(drawn, limit)
        yield from in_order(pool, read, places, READ_AHEAD)


def _first_rows(drawn: Iterable[Place], limit: int) -> list[Place]:
    """Returns the first `limit` of the rows drawn, in file order."""
    places: list[Place] = []
    for shard, group, rows in drawn:
        assert rows is not None
        places += [(shard, group, rows[:limit])] if len(rows) else []
        limit -= len(rows)
        if limit <= 0:
            break
    return sorted(places, key=lambda place: place[:2])


def read_places(uri: str, places_N3: np.ndarray) -> pa.Table:
    """Reads single rows by the values of their `PLACE` columns, in the order given."""
    manifest, (fs, root) = read_manifest(uri), open_uri(uri)
    rows = []
    for shard, group, row in places_N3.tolist():
        columns = COLUMNS[manifest.modality]
        table = read_row_group(fs, root, manifest.shards[shard].file, group, columns)
        rows.append(table.slice(row, 1))
    return pa.concat_tables(rows)


def table_labels(rows: pa.Table) -> np.ndarray:
    """Returns the class index of every row as int64 [N], -1 where there is none."""
    labels: np.ndarray = rows["label"].fill_null(-1).to_numpy().astype(np.int64)
    return labels


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[In], Out], items: Iterable[In], ahead: int
) -> Generator[Out]:
    """Maps in the pool and yields in order; at most `ahead` items run before the consumer."""
    pending: deque[Future[Out]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # a consumer that stops early does not wait for what it will not read
        for future in pending:
            future.cancel()
