"""Deterministic training batches, by a Ray dataset of each rank.

    plan -> pieces -> Ray Data tasks: rows + crop boxes + masks -> [decode] -> batches, prefetched
                      (the first pieces: this process, while Ray Data starts, tables.py)

Every rank runs its own dataset over its own lanes (plan.py). No splitter decides by timing which
rank gets a row, so order, crops and masks are the same for any number of workers. With
`decode_in="trainer"`, tasks ship encoded bytes and the rank decodes them in threads. With `"data"`,
a second stage of tasks decodes and ships uint8 crops. The pixels are equal bit for bit. The figures
behind these choices are in docs/loading.md.

Shape suffixes: B rows of this rank, N flattened; masks as in `pipelines.loading.masks.maskers`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from models.keyed_random.arrays import sample_keys
from models.media.regions import Region
from pipelines.config.train import PretrainConfig
from pipelines.loading.actions import action_reader
from pipelines.loading.clips import training_sampler
from pipelines.loading.cpu_share import DataWatch, Share, cluster_share, tell_crowd
from pipelines.loading.decoding import decode_into, pixel_shape
from pipelines.loading.masks.maskers import MASK_NAMES, Masker, make_masker
from pipelines.loading.mixing import TrainingSet, merged, training_sets
from pipelines.loading.plan import make_plan, rank_lanes
from pipelines.loading.prefetch import Prefetch
from pipelines.loading.read_tasks import Reader
from pipelines.loading.tables import iter_tables


def train_batches(
    cfg: PretrainConfig,
    *,
    rank: int,
    world_size: int,
    start_step: int,
    end_step: int,
    say: Callable[[str], None] = print,
) -> Iterator[dict[str, Any]]:
    """Yields this rank's part of the batch of every step from `start_step` to `end_step`.

    The batches depend only on the arguments and the shards: crops and masks are keyed by (seed,
    epoch, sample id), legacy masks by (seed, epoch, batch). Works in a Ray Train worker and in a
    plain process. Closing the iterator stops the tasks.

    Args:
        cfg: the run's configuration.
        rank: number of this worker.
        world_size: number of workers; must divide `cfg.data.lanes`.
        start_step: first step, inclusive.
        end_step: last step, exclusive.
        say: takes lines for the user, about waiting for CPUs or data.

    Yields:
        A dict with these entries:
        images: uint8 tensor [B, C, H, W], B = batch_size / world_size (pinned if `run.gpu`).
        clips: uint8 tensor [B, C, T, H, W] instead of `images`, from shards of video.
        masks under the names of `pipelines.loading.masks.maskers.MaskArrays`: int64 tensors of
            ascending token numbers, by the objective's masker.
        sample_keys: int64 tensor [B], the keys by which an objective draws random numbers.
        labels: int64 tensor [B], -1 where there is no label.
        sample_ids: list of B 16-byte ids.
        crop_boxes: float32 array [B, 4], (x0, y0, x1, y1) in pixels of the stored image.
        flipped: bool array [B].
        grids: int64 tensor [B, 2], kept_ids: int64 tensor [B, K'], kept_valid: bool tensor [B, K'],
            only with the fit `whole` or with regions left out: rows and columns of each sample's
            grid, its tokens in ascending order, and which of these are not padding. With `whole`,
            pixels are strips (`pipelines.loading.decoding`).
        frames: int32 array [B, T], for clips: frame numbers in the segment.
        actions: float32 tensor [B, T - 1, A], only for world models: what was done between the
            frames of a clip, NaN where the segment has ended.
        step, epoch: ints.

    Raises:
        ValueError: the settings cannot work with these shards; the flag is named.
        StarvedError: the workers leave no CPU for Ray Data.
        DecodeError: a stored image or video does not decode; the sample is named.
        ActionError: a segment lacks the actions that the objective takes; it is named.
    """
    readers = [make_reader(cfg, rank, world_size, part) for part in training_sets(cfg)]
    if start_step >= end_step:
        return
    share = cluster_share(cfg, world_size, datasets=len(readers), say=say)
    if rank == 0:
        tell_crowd(share, world_size * len(readers), say)
    threads = cfg.data.decode_threads
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        source = _all_batches(cfg, readers, range(start_step, end_step), share, pool)
        ahead = Prefetch(source, cfg.data.prefetch_batches, DataWatch(rank, say))
        with contextlib.closing(ahead):
            yield from ahead


def make_reader(
    cfg: PretrainConfig, rank: int, world_size: int, part: TrainingSet | None = None
) -> Reader:
    """Makes the settings of this rank's read tasks for one set.

    Args:
        cfg: the run's configuration.
        rank: number of this worker.
        world_size: number of workers.
        part: the set, from `training_sets`; None for --data.train.

    Raises:
        ValueError: there is no manifest, there are too few samples, or lanes or masks cannot work.
    """
    part = part or training_sets(cfg)[0]
    manifest = part.manifest
    plan = make_plan(manifest.row_group_array(), part.data, cfg.run.seed)
    masker = make_masker(cfg)
    masker.check()  # here and not in the first task, so that its error is raised as it is
    return Reader(
        uri=part.data.train,
        files={index: shard.file for index, shard in enumerate(manifest.shards)},
        plan=plan,
        lanes=rank_lanes(plan, rank, world_size),
        masker=masker,
        data=part.data,
        model=cfg.model,
        row_bytes=max(1.0, manifest.num_bytes / manifest.num_samples),
        sampler=training_sampler(cfg),
        actions=action_reader(cfg),
    )


def _all_batches(
    cfg: PretrainConfig, readers: list[Reader], steps: range, share: Share, pool: ThreadPoolExecutor
) -> Generator[dict[str, Any]]:
    """Yields the batches of these steps, merged where there are several sets."""
    with contextlib.ExitStack() as stack:
        sources = [
            stack.enter_context(contextlib.closing(_batches(cfg, reader, steps, share, pool)))
            for reader in readers
        ]
        if len(sources) == 1:
            yield from sources[0]
        else:
            yield from merged(zip(*sources, strict=True), len(readers[0].lanes))


def _batches(
    cfg: PretrainConfig, reader: Reader, steps: range, share: Share, pool: ThreadPoolExecutor
) -> Generator[dict[str, Any]]:
    """Yields the batches of one set."""
    with contextlib.closing(iter_tables(cfg, reader, steps, share)) as tables:
        for step, table in zip(steps, tables, strict=True):
            yield to_batch(cfg, reader, table, step, pool)


def to_batch(
    cfg: PretrainConfig, reader: Reader, table: pa.Table, step: int, pool: ThreadPoolExecutor
) -> dict[str, Any]:
    """Makes the batch of a step, as `train_batches` describes it, of its rows from `read_piece`."""
    shape, rows = pixel_shape(cfg), table.num_rows
    assert rows == reader.local_batch, f"{rows} rows at step {step}, not {reader.local_batch}"
    assert (table.column("step").to_numpy() == step).all(), f"out of order at step {step}"
    pixels = torch.empty((rows, *shape), dtype=torch.uint8, pin_memory=cfg.run.gpu)
    if "pixels" in table.column_names:
        column = table.column("pixels").combine_chunks()
        flat_N = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * math.prod(shape) :]
        np.copyto(pixels.numpy().reshape(-1), flat_N[: pixels.numel()])
    else:
        jobs = min(4 * cfg.data.decode_threads, max(1, rows // 8))
        decode_into(cfg.model, table, pixels.numpy(), pool, jobs)
    ids, epoch = table.column("sample_id").to_pylist(), reader.plan.locate(step)[0]
    keys_B = sample_keys(ids, cfg.run.seed, epoch)
    batch = {
        "images" if reader.sampler is None else "clips": pixels,
        "labels": torch.from_numpy(table.column("label").fill_null(-1).to_numpy().astype(np.int64)),
        "sample_ids": ids,
        "sample_keys": torch.from_numpy(keys_B.view(np.int64)),
        "crop_boxes": _numbers(table, "crop").reshape(rows, 4).astype(np.float32),
        "flipped": table.column("flipped").to_numpy(),
        "step": step,
        "epoch": epoch,
    }
    if reader.sampler is not None:
        batch["frames"] = _numbers(table, "frames").reshape(rows, -1)
    if reader.actions is not None:
        steps = (rows, cfg.clip_frames - 1, reader.actions.width)
        batch["actions"] = torch.from_numpy(_numbers(table, "between").reshape(steps).copy())
    if "kept_ids" in table.column_names:
        batch |= _layout(table)
        batch["regions"] = _regions(cfg.model.exclude, table, batch)
    for name in table.column_names:
        if name.startswith(MASK_NAMES):
            batch[name] = _ids(table, name, reader.masker)
    return batch


def _layout(table: pa.Table) -> dict[str, torch.Tensor]:
    """Returns the grid and the kept tokens of every sample, padded to the most of the batch."""
    kept = [torch.tensor(ids) for ids in table.column("kept_ids").to_pylist()]
    ids_BK = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=-1)
    grids_B2 = torch.from_numpy(_numbers(table, "grid").reshape(-1, 2).astype(np.int64))
    return {"grids": grids_B2, "kept_ids": ids_BK.clamp(min=0), "kept_valid": ids_BK >= 0}


def _regions(regions: tuple[Region, ...], table: pa.Table, batch: dict[str, Any]) -> torch.Tensor:
    """Returns the regions as fractions of each crop, float32 [B, R, 4]."""
    width_B, height_B = (table.column(name).to_numpy() for name in ("width", "height"))
    sides_B14 = np.stack([width_B, height_B] * 2, axis=1)[:, None]
    boxes_B4 = batch["crop_boxes"]
    start_B14 = boxes_B4[:, None, [0, 1, 0, 1]]
    length_B14 = boxes_B4[:, None, [2, 3, 2, 3]] - start_B14
    found_BR4 = (np.array(regions).reshape(-1, 4) * sides_B14 - start_B14) / length_B14
    left, top, right, bottom = np.moveaxis(found_BR4, -1, 0)
    mirrored_BR4 = np.stack([1 - right, top, 1 - left, bottom], axis=-1)
    placed = np.where(batch["flipped"][:, None, None], mirrored_BR4, found_BR4)
    return torch.from_numpy(placed.astype(np.float32))


def _numbers(table: pa.Table, name: str) -> Any:
    return table.column(name).combine_chunks().flatten().to_numpy()


def _ids(table: pa.Table, name: str, masker: Masker) -> torch.Tensor:
    ids = torch.from_numpy(_numbers(table, name).astype(np.int64))
    lists = (masker.lists[name],) if name in masker.lists else ()
    return ids.reshape(table.num_rows, *lists, -1)
