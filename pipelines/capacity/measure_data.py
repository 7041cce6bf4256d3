"""Measures what reading and decoding a run's own shards costs on this machine."""

from __future__ import annotations

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from pipelines.capacity.constants import Constant, measured_rate
from pipelines.config.train import PretrainConfig
from pipelines.loading.loader import make_reader, to_batch
from pipelines.loading.plan import Piece, iter_pieces
from pipelines.loading.read_tasks import Reader, read_piece

PIECES, MOST_BATCHES = 3, 24
"""Read tasks whose rows are read, and batches of them that are decoded."""
RAY_SHARE = (1.15, 1.0, 1.35)
"""CPU seconds of the loader as it runs on Ray Data, as a multiple of its own functions (middle and
bounds): between 1.1 and 1.25 in two rounds that are described in benchmarks/data/loader.md."""


def measure_data(cfg: PretrainConfig) -> dict[str, Constant]:
    """Measures reading and decoding, in CPU seconds of a sample, and reading in bytes/s.

    Args:
        cfg: the run; `cfg.data.train` names shards.

    Raises:
        ValueError: there are no shards, or the run cannot be trained on them; the flag is named.
    """
    reader = make_reader(cfg, 0, cfg.run.most_workers)
    todo = list(islice(iter_pieces(reader.plan, 0, _many(reader), reader.most_batches), PIECES))
    reads, decodes = [], []
    with ThreadPoolExecutor(1) as pool:
        for piece in todo:
            start = time.process_time()
            tables = list(read_piece(reader, piece))
            rows = sum(table.num_rows for table in tables)
            reads.append((time.process_time() - start) / rows)
            for batch in islice(_batches(reader, tables), MOST_BATCHES // PIECES):
                decodes.append(_decode(cfg, reader, batch, pool))
    what = f"measured here on {len(decodes)} batches of --data.train"
    return {
        "read_cpu_s": _cpu_seconds(reads, what),
        "decode_cpu_s": _cpu_seconds(decodes, what),
        "read_bytes_s": _speed(reader, todo, what),
    }


def _many(reader: Reader) -> int:
    return (PIECES + 1) * (reader.plan.batches_per_epoch + 1)


def _batches(reader: Reader, tables: list[Any]) -> Any:
    for table in tables:
        for first in range(0, table.num_rows, reader.local_batch):
            yield table.slice(first, reader.local_batch)


def _decode(cfg: PretrainConfig, reader: Reader, batch: Any, pool: ThreadPoolExecutor) -> float:
    """CPU seconds of a sample, over all threads of this process."""
    start = time.process_time()
    to_batch(cfg, reader, batch, batch.column("step")[0].as_py(), pool)
    return (time.process_time() - start) / int(batch.num_rows)


def _cpu_seconds(seconds: list[float], source: str) -> Constant:
    seconds = seconds if len(seconds) > 1 else seconds * 2
    quick, _, slow = statistics.quantiles(seconds, n=4)
    middle, low, high = RAY_SHARE
    value = statistics.median(seconds)
    return Constant(value * middle, min(quick, value) * low, max(slow, value) * high, source)


def _speed(reader: Reader, todo: list[Piece], source: str) -> Constant:
    """Bytes/s of as many read tasks beside each other as there are cores."""
    cores = max(2, os.cpu_count() or 1)
    seconds, sizes = [], []
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(3):
            start = time.perf_counter()
            tables = pool.map(lambda piece: list(read_piece(reader, piece)), (todo * cores)[:cores])
            sizes.append(sum(t.column(reader.modality).nbytes for piece in tables for t in piece))
            seconds.append(time.perf_counter() - start)
    return measured_rate(statistics.median(sizes), seconds, source)
