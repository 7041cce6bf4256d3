"""The first rows come while Ray Data starts; generators run ahead of their consumers."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator

import pyarrow as pa
import pytest

from helpers.pipelines.loading import config, write_samples
from pipelines.loading import tables
from pipelines.loading.cpu_share import Share
from pipelines.loading.loader import make_reader
from pipelines.loading.plan import iter_pieces
from pipelines.loading.prefetch import Prefetch
from pipelines.loading.read_tasks import Reader, read_piece

SHARE = Share(cpus=1.0, read_cpus=1.0, decode_cpus=0.0, object_store_bytes=1e9)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Of four batches of 32 an epoch, in pieces of two."""
    return make_reader(config(write_samples(tmp_path_factory.mktemp("shards"))), 0, 1)


def test_first_rows_do_not_wait_for_ray(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def blocks(cfg: object, part: Reader, pieces: list, share: Share) -> Generator[pa.Table]:
        try:
            begun.set()
            assert may_go_on.wait(60)
            for piece in pieces:
                yield from read_piece(part, piece)
        finally:
            closed.set()

    monkeypatch.setattr(tables, "_blocks", blocks)
    monkeypatch.setattr(tables, "HEAD_ROWS", 100)  # two pieces of 64
    found = tables.iter_tables(config(reader.uri), reader, range(8), SHARE)
    first = [next(found) for _ in range(4)]
    assert begun.wait(60), "Ray Data is to start beside the first rows"
    may_go_on.set()
    steps = [table.column("step").unique().to_pylist() for table in [*first, *found]]
    assert steps == [[step] for step in range(8)]
    assert closed.is_set()


def test_what_this_process_reads_itself_is_bounded(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [*iter_pieces(reader.plan, 0, 40, reader.most_batches)]
    assert [piece.stop - piece.start for piece in pieces] == [2] * 20
    for rows, expected in ((0, 0), (1, 1), (64, 1), (65, 2), (10**6, 20)):
        monkeypatch.setattr(tables, "HEAD_ROWS", rows)
        assert tables.head_pieces(reader, pieces) == expected
    monkeypatch.setattr(tables, "HEAD_BYTES", 65 * reader.row_bytes)
    assert tables.head_pieces(reader, pieces) == 2


def test_blocks_that_are_cut_anywhere_give_whole_batches() -> None:
    rows = pa.table({"step": [*range(24)]})
    blocks = [rows.slice(0, 3), rows.slice(3, 9), rows.slice(12, 2), rows.slice(14, 10)]
    found = [table.column("step").to_pylist() for table in tables._cut(blocks, 4)]
    assert found == [[*range(first, first + 4)] for first in range(0, 24, 4)]
    with pytest.raises(AssertionError, match="within a batch"):
        list(tables._cut([rows.slice(0, 5)], 4))


# --- prefetching


def test_prefetch_passes_items_and_errors_on() -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise KeyError("boom")

    items = Prefetch(source(), 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="boom"):
        next(items)
    assert not list(items)


def test_prefetch_starts_at_once_and_stops_its_source_when_closed() -> None:
    begun, closed = threading.Event(), []

    def source() -> Iterator[int]:
        try:
            while True:
                begun.set()
                yield 1
        finally:
            closed.append(True)

    items = Prefetch(source(), 2)
    assert begun.wait(60)
    assert next(items) == 1
    items.close()
    assert closed == [True]
    assert not list(items)
