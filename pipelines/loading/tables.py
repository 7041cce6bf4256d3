"""Tables of a rank's batches in order: the first ones read in its process, the rest by Ray Data.

A Ray dataset takes seconds to give its first rows, because worker processes start and import Ray
Data. Meanwhile the process of the rank itself reads the first pieces, by the same function as the
tasks, so it makes no difference to the rows who has read them.

A run of many pieces is a chain of datasets, because a dataset holds all of its tasks from the
start. Each of them begins in the same way, so that nothing waits between two.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.loading.actions import ActionError
from pipelines.loading.cpu_share import Share
from pipelines.loading.decoding import DecodeError, decode_into, pixel_shape
from pipelines.loading.plan import Piece, iter_pieces
from pipelines.loading.prefetch import Prefetch
from pipelines.loading.read_tasks import Reader, read_piece, read_pieces
from pipelines.runtime.cluster import configure_data

SEGMENT_PIECES = 512
"""Read tasks in one Ray dataset: many epochs, so that few of them wait for a dataset to start."""
HEAD_ROWS, HEAD_BYTES = 8192, 256 * 2**20
"""Rows at the beginning of a dataset that the rank's process reads itself, and their encoded bytes:
whichever is less. Enough for some seconds of decoding, after which Ray Data has started."""


def iter_tables(
    cfg: PretrainConfig, reader: Reader, steps: range, share: Share
) -> Generator[pa.Table]:
    """Yields one table for every step, with the rows of `read_piece`.

    Args:
        cfg: the run.
        reader: the settings of one set.
        steps: which steps.
        share: the part of the cluster that may be used.

    Yields:
        Tables of `reader.local_batch` rows. Some of them have `pixels` in place of the encoded
        column: those that a task has decoded.
    """
    todo = iter_pieces(reader.plan, steps.start, steps.stop, reader.most_batches)
    while segment := list(itertools.islice(todo, SEGMENT_PIECES)):
        part = reader.part(segment)
        head = head_pieces(reader, segment)
        with ExitStack() as stack:
            sources = []
            if head:
                mine = (block for piece in segment[:head] for block in read_piece(part, piece))
                sources.append(mine)
            if head < len(segment):
                sources.append(_blocks(cfg, part, segment[head:], share))
            ahead = [stack.enter_context(closing(Prefetch(source, 1))) for source in sources]
            yield from _cut(itertools.chain(*ahead), reader.local_batch)


def head_pieces(reader: Reader, pieces: list[Piece]) -> int:
    """Returns how many of the first pieces have the rows that the rank's process reads itself."""
    wanted = min(HEAD_ROWS, HEAD_BYTES / reader.row_bytes) / reader.local_batch
    batches = (piece.stop - piece.start for piece in pieces[:-1])
    return sum(before < wanted for before in itertools.accumulate(batches, initial=0))


def _cut(blocks: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Cuts blocks into tables of this many rows; Ray may have cut the blocks anywhere."""
    rest: list[pa.Table] = []
    for block in blocks:
        table = pa.concat_tables([*rest, block]) if rest else block
        whole = len(table) - len(table) % rows
        for first in range(0, whole, rows):
            yield table.slice(first, rows)
        rest = [table.slice(whole)] if whole < len(table) else []
    assert not rest, "the blocks end within a batch"


def _blocks(
    cfg: PretrainConfig, reader: Reader, pieces: list[Piece], share: Share
) -> Generator[pa.Table]:
    """Yields the blocks of a Ray dataset; a task's own errors without Ray's exception around."""
    from ray.exceptions import RayTaskError

    dataset = make_dataset(cfg, reader, pieces, share)
    blocks = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    with closing(iter(blocks)) as blocks:
        try:
            yield from blocks
        except RayTaskError as error:
            if isinstance(error.cause, DecodeError | ActionError):
                raise error.cause from error
            raise


def make_dataset(cfg: PretrainConfig, reader: Reader, pieces: list[Piece], share: Share) -> Any:
    """Returns a Ray dataset of the rows of these pieces, in order."""
    import ray.data
    from ray.data import ExecutionResources

    # Ray would print a line for every execution in the middle of the trainer's progress line.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # One block a piece. ray.data.range and from_arrow would run tasks of one CPU each, which a
    # cluster full of train workers does not have.
    count = len(pieces)
    dataset = ray.data.from_items([*range(count)], override_num_blocks=count).map_batches(
        functools.partial(read_pieces, reader, pieces),
        batch_size=None,
        num_cpus=share.read_cpus,
    )
    if cfg.data.decode_in == "data":
        # With the same number of CPUs, Ray would fuse the stages and decode a window on one core.
        dataset = dataset.map_batches(
            functools.partial(_decode, cfg.model, pixel_shape(cfg)),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=share.decode_cpus,
        )
    context = dataset.context
    configure_data(context)
    context.raise_original_map_exception = True
    # Ray would join blocks that are smaller, and cut those of more than 1.5 times as much.
    block_bytes = reader.block_batches * reader.local_batch * reader.row_bytes
    context.target_max_block_size = int(0.8 * block_bytes)
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        cpu=share.cpus, object_store_memory=share.object_store_bytes
    )
    return dataset


def _decode(model: ModelConfig, shape: tuple[int, ...], table: pa.Table) -> pa.Table:
    """Replaces the encoded images or videos by uint8 crops of this shape; a Ray Data task."""
    torch.set_num_threads(1)
    pixels = np.empty((table.num_rows, *shape), np.uint8)
    decode_into(model, table, pixels)
    flat = pa.py_buffer(pixels)
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(math.prod(shape)), table.num_rows, [None, flat]
    )
    encoded = "video" if "video" in table.column_names else "image"
    return table.drop_columns([encoded]).append_column("pixels", column)
