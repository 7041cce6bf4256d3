"""The body of a Ray Data read task: reads the plan's rows and adds their clips, crops and masks.

Imports neither torch nor Ray, so that a worker that only reads starts fast and stays small.

Shape suffixes: B rows of one rank's batch, N rows of a block (whole batches), T frames of a clip,
3 = (shard, row group, row).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.keyed_random.arrays import I64, U64, key_of, sample_keys, uniforms
from models.keyed_random.streams import PlanStream, SampleStream
from pipelines.config.data import DataConfig
from pipelines.config.train import ModelConfig
from pipelines.dataset.row_groups import read_row_group
from pipelines.dataset.shards import sample_ids_array
from pipelines.loading.actions import ActionReader
from pipelines.loading.clips import ClipSampler
from pipelines.loading.masks.layouts import Layout, draw_crops
from pipelines.loading.masks.maskers import Masker
from pipelines.loading.plan import Piece, Plan, lane_windows, part_of
from pipelines.runtime.uris import open_uri

I32 = npt.NDArray[np.int32]

COLUMNS = {
    "image": ("sample_id", "image", "height", "width", "label", "source_uri"),
    "video": (
        *("sample_id", "video", "height", "width", "num_frames", "fps", "start_s"),
        *("label", "source_uri"),
    ),
}
"""Columns that are read from the shards, by modality."""
BLOCK_BYTES = {"trainer": 32 * 2**20, "data": 4 * 2**20}
"""Encoded bytes of one block, by where it is decoded: large enough that Ray's cost of about 5 ms a
block does not matter, and small enough that many tasks can share the decoding of a piece."""
PIECE_BYTES = 256 * 2**20
"""Encoded bytes of one piece. A larger window is cut into pieces. Each piece reads the window's row
groups and keeps its own rows, so memory is bounded, but the window is read once for every piece."""
REMOTE_READS = 8
"""Row groups fetched from object storage at the same time."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Everything a read task needs apart from its piece; pickled once for all tasks."""

    uri: str
    files: Mapping[int, str]
    """Shard file names by shard index."""
    plan: Plan
    lanes: range
    """The lanes that this rank reads."""
    masker: Masker
    data: DataConfig
    model: ModelConfig
    row_bytes: float
    """Mean number of encoded bytes in a sample."""
    sampler: ClipSampler | None = None
    """Chooses the frames of a clip; None for images."""
    actions: ActionReader | None = None
    """Reads the actions between them; None if the objective takes none."""

    @property
    def most_batches(self) -> int:
        """Number of this rank's batches in a piece of `PIECE_BYTES`."""
        return max(1, int(PIECE_BYTES / (self.row_bytes * self.local_batch)))

    @property
    def block_batches(self) -> int:
        """Number of this rank's batches in a block of `BLOCK_BYTES`."""
        wanted = BLOCK_BYTES[self.data.decode_in]
        return max(1, int(wanted / (self.row_bytes * self.local_batch)))

    @property
    def modality(self) -> str:
        """`image` or `video`, which is also the name of the column of encoded bytes."""
        return "image" if self.sampler is None else "video"

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read from the shards."""
        return (*COLUMNS[self.modality], *(("actions",) if self.actions else ()))

    @property
    def local_batch(self) -> int:
        """Number of rows that this rank contributes to one batch."""
        return len(self.lanes) * self.plan.lane_batch

    def part(self, pieces: Sequence[Piece]) -> Reader:
        """Returns a reader that knows no more of the data set than these pieces need."""
        plan = part_of(self.plan, pieces, self.lanes)
        sequences = (plan.known or {}).values()
        shards = np.unique(np.concatenate([part.groups_G3[:, 0] for part in sequences])).tolist()
        files = {shard: self.files[shard] for shard in shards}
        return dataclasses.replace(self, plan=plan, files=files)


def read_pieces(
    reader: Reader, pieces: Sequence[Piece], batch: dict[str, Any]
) -> Iterator[pa.Table]:
    """Runs `read_piece` for the pieces whose indices are in column `item`; a Ray Data task."""
    for index in batch["item"]:
        yield from read_piece(reader, pieces[index])


def read_piece(reader: Reader, piece: Piece) -> Iterator[pa.Table]:
    """Reads the rows of a piece that belong to this rank's lanes.

    Args:
        reader: the settings.
        piece: the batches to read.

    Yields:
        Tables of `reader.block_batches`, in order; the last one may have fewer. Columns are the
        shard's, and `step`, `crop` (left, top, right, bottom, in pixels), `flipped`, the masks
        (flattened) and, for video, `frames` (the clip's frame numbers) and, for world models,
        `between` (the actions between them, flattened).
    """
    rows_N3 = lane_windows(reader.plan, piece, reader.lanes)
    table, index_N = _read_rows(reader, rows_N3)
    for first in range(piece.start, piece.stop, reader.block_batches):
        stop = min(first + reader.block_batches, piece.stop)
        low, high = ((b - piece.start) * reader.local_batch for b in (first, stop))
        block = table.take(pa.array(index_N[low:high]))
        yield _with_draws(reader, block, piece, first, stop)


def _read_rows(reader: Reader, rows_N3: I64) -> tuple[pa.Table, I64]:
    """Reads every row group once. Returns the rows in one chunk, and the place of each in it."""
    order_N = np.lexsort(rows_N3.T[::-1])  # by shard, row group, row
    groups_G2, starts_G = np.unique(rows_N3[order_N, :2], axis=0, return_index=True)
    wanted = np.split(rows_N3[order_N, 2], starts_G[1:])
    fs, root = open_uri(reader.uri)

    def read(group: I64, rows: I64) -> pa.Table:
        columns, encoded = reader.columns, reader.modality
        table = read_row_group(fs, root, reader.files[int(group[0])], int(group[1]), columns)
        # Arrow's `binary` has 32-bit offsets: taking or joining rows fails beyond 2 GiB of images.
        place = table.schema.get_field_index(encoded)
        large = table.column(encoded).cast(pa.large_binary())
        return table.set_column(place, encoded, large).take(pa.array(rows))

    if "file" in fs.protocol:
        tables = list(map(read, groups_G2, wanted))
    else:
        with ThreadPoolExecutor(REMOTE_READS) as pool:
            tables = list(pool.map(read, groups_G2, wanted))
    index_N = np.empty(len(order_N), np.int64)
    index_N[order_N] = np.arange(len(order_N))
    # One chunk, because `take` first joins all chunks of a binary column, and is called for every
    # block.
    return pa.concat_tables(tables).combine_chunks(), index_N


def _with_draws(reader: Reader, block: pa.Table, piece: Piece, first: int, stop: int) -> pa.Table:
    """Adds the random columns. All but legacy masks depend only on (seed, epoch, sample id)."""
    keys_N = sample_keys(sample_ids_array(block), reader.plan.seed, piece.epoch)
    sizes_N2 = np.stack([block.column("height").to_numpy(), block.column("width").to_numpy()], 1)
    flipped_N = np.zeros(len(keys_N), np.bool_)
    if reader.data.flip:
        flipped_N = uniforms(keys_N, SampleStream.FLIP, 1)[:, 0] < 0.5
    boxes_N4, layout = draw_crops(keys_N, sizes_N2, flipped_N, reader.model, reader.data)
    steps_N = piece.step + np.repeat(np.arange(first, stop) - piece.start, reader.local_batch)
    added = {
        "step": pa.array(steps_N),
        "crop": pa.FixedSizeListArray.from_arrays(pa.array(boxes_N4.reshape(-1)), 4),
        "flipped": pa.array(flipped_N),
    }
    if reader.sampler is not None:
        lengths_N, fps_N = (block.column(name).to_numpy() for name in ("num_frames", "fps"))
        frames_NT = reader.sampler.random(lengths_N, fps_N, keys_N)
        flat = pa.array(frames_NT.reshape(-1))
        added["frames"] = pa.FixedSizeListArray.from_arrays(flat, frames_NT.shape[1])
        if reader.actions is not None:
            between = reader.actions.between(block, frames_NT)
            added["between"] = _lists([between])
            block = block.drop_columns(["actions"])
    if layout is not None:
        grids = pa.array(layout.grids_B2.astype(np.int32).reshape(-1))
        added["grid"] = pa.FixedSizeListArray.from_arrays(grids, 2)
        added["kept_ids"] = _lists([ids[None] for ids in layout.kept_ids(reader.model.grid.tubes)])
    for name, parts in _masks(reader, keys_N, piece.epoch, range(first, stop), layout).items():
        added[name] = _lists(parts)
    for name, column in added.items():
        block = block.append_column(name, column)
    return block


def _masks(
    reader: Reader, keys_N: U64, epoch: int, batches: range, layout: Layout | None
) -> dict[str, list[I32]]:
    """Draws masks: by name, one array for each batch (legacy), or one array for all of them."""
    if not reader.masker.legacy:
        return {name: [ids] for name, ids in reader.masker.for_samples(keys_N, layout).items()}
    plan = reader.plan
    mine = slice(reader.lanes.start * plan.lane_batch, reader.lanes.stop * plan.lane_batch)
    drawn = [
        reader.masker.for_batch(
            key_of(plan.seed, PlanStream.LEGACY_MASKS, epoch, batch), plan.batch_size
        )
        for batch in batches
    ]
    return {name: [masks[name][mine] for masks in drawn] for name in drawn[0]}


def _lists(parts: Sequence[npt.NDArray[Any]]) -> Any:
    """Returns a column of lists, one for each row of the arrays; lengths differ between arrays."""
    flat = np.concatenate([part.reshape(-1) for part in parts])
    lengths = np.concatenate([np.full(len(p), p[0].size if len(p) else 0) for p in parts])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
