"""Batches are equal for any number of workers and either place of decoding."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from ray.data import DataContext

from helpers.pipelines.loading import (
    assert_equal,
    config,
    global_batches,
    join,
    variants,
    write_samples,
)
from helpers.repository import ROOT
from models.image_size import Grid
from models.keyed_random.arrays import sample_keys
from models.media.images import decode_image
from pipelines.config.data import MaskConfig
from pipelines.config.train import PretrainConfig
from pipelines.dataset.row_groups import read_row_group
from pipelines.dataset.shards import hash_bytes
from pipelines.loading import read_tasks as reading
from pipelines.loading import tables
from pipelines.loading.cpu_share import cluster_share
from pipelines.loading.loader import make_reader, train_batches
from pipelines.loading.masks.multiblock import multiblock_masks
from pipelines.loading.plan import Piece, iter_pieces
from pipelines.loading.read_tasks import Reader
from pipelines.runtime.uris import open_uri


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_samples(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module", autouse=True)
def _all_by_ray() -> Iterator[None]:
    """These data sets are so small that without it Ray Data would read nothing of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "HEAD_ROWS", 0)
        yield


@pytest.fixture(scope="module")
def alone(data: str, ray_local: None) -> list[dict]:
    """Ten steps of one worker, over two epoch boundaries (4 batches an epoch)."""
    return global_batches(config(data), 1, 0, 10)


# --- contents of a batch


@pytest.mark.ray
def test_shapes_and_types(alone: list[dict]) -> None:
    assert [batch["step"] for batch in alone] == list(range(10))
    assert [batch["epoch"] for batch in alone] == [0] * 4 + [1] * 4 + [2] * 2
    for batch in alone:
        assert batch["images"].shape == (32, 3, 32, 32)
        assert batch["images"].dtype == torch.uint8
        assert batch["images"].is_contiguous()
        assert batch["context_ids"].shape == (32, 16)
        assert batch["target_ids"].shape == (32, 4, 9)
        assert batch["context_ids"].dtype == batch["target_ids"].dtype == torch.int64
        assert len(set(batch["sample_ids"])) == 32
        assert {len(sample) for sample in batch["sample_ids"]} == {16}
        assert batch["labels"].min() >= -1
        assert batch["crop_boxes"].shape == (32, 4)
        assert batch["crop_boxes"].dtype == np.float32


@pytest.mark.ray
def test_masks_are_those_of_the_sample(alone: list[dict]) -> None:
    for batch in alone:
        keys = sample_keys(batch["sample_ids"], 0, batch["epoch"])
        context, target = multiblock_masks(keys, Grid(8, 8), MaskConfig())
        assert (batch["context_ids"].numpy() == context).all()
        assert (batch["sample_keys"].numpy().view(np.uint64) == keys).all()
        assert (batch["target_ids"].numpy() == target).all()


@pytest.mark.ray
def test_an_epoch_repeats_no_sample(alone: list[dict]) -> None:
    for epoch in (0, 1):
        seen = [s for batch in alone if batch["epoch"] == epoch for s in batch["sample_ids"]]
        assert len(seen) == len(set(seen)) == 128


@pytest.mark.ray
def test_labels_and_pixels_belong_to_the_sample(alone: list[dict], data: str) -> None:
    from pipelines.dataset.shards import read_rows

    rows = {row["sample_id"]: row for row in read_rows(data).to_pylist()}
    for batch in alone:
        for i, sample in enumerate(batch["sample_ids"]):
            row = rows[sample]
            assert batch["labels"][i] == (-1 if row["label"] is None else row["label"])
            assert_near_reference(row, batch, i)


def assert_near_reference(row: dict, batch: dict, i: int) -> None:
    """Pillow's decoder and resize, independent of ours and so not equal to the last bit."""
    box = batch["crop_boxes"][i]
    image = decode_image(row["image"]).resize((32, 32), Image.Resampling.BICUBIC, box=tuple(box))
    expected = np.asarray(image).transpose(2, 0, 1).astype(np.int64)
    if batch["flipped"][i]:
        expected = expected[:, :, ::-1]
    difference = np.abs(batch["images"][i].numpy() - expected)
    assert difference.mean() < 3, row["source_uri"]
    assert np.quantile(difference, 0.99) < 16, row["source_uri"]


@pytest.mark.ray
def test_all_kinds_were_seen(alone: list[dict]) -> None:
    seen = {sample for batch in alone for sample in batch["sample_ids"]}
    missing = [i for i, data in enumerate(variants()) if hash_bytes(data) not in seen]
    assert not missing


# --- what batches depend on


@pytest.mark.ray
@pytest.mark.parametrize("world_size", [2, 4])
def test_number_of_workers_changes_nothing(alone: list[dict], data: str, world_size: int) -> None:
    assert_equal(global_batches(config(data), world_size, 0, 10), alone)


@pytest.mark.ray
@pytest.mark.parametrize("world_size", [1, 2])
def test_place_of_decoding_changes_nothing(alone: list[dict], data: str, world_size: int) -> None:
    assert_equal(global_batches(config(data, decode_in="data"), world_size, 0, 10), alone)


@pytest.mark.ray
@pytest.mark.parametrize("start", [3, 4, 7])
def test_resume_equals_the_tail(alone: list[dict], data: str, start: int) -> None:
    assert_equal(global_batches(config(data), 1, start, 10), alone[start:])


@pytest.mark.ray
def test_threads_prefetch_and_segments_change_nothing(
    alone: list[dict], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SEGMENT_PIECES", 2)
    cfg = config(data, decode_threads=4, prefetch_batches=1)
    assert_equal(global_batches(cfg, 1, 0, 10), alone)


@pytest.mark.ray
@pytest.mark.parametrize("place", ["trainer", "data"])
@pytest.mark.parametrize(("rows", "mine"), [(1, 2), (10**6, 5)])
def test_what_this_process_reads_itself_changes_nothing(
    alone: list[dict], data: str, monkeypatch: pytest.MonkeyPatch, place: str, rows: int, mine: int
) -> None:
    """The first piece of both datasets, or all pieces."""
    read = []

    def read_piece(reader: Reader, piece: Piece) -> Iterator[pa.Table]:
        read.append(piece)
        return reading.read_piece(reader, piece)

    monkeypatch.setattr(tables, "read_piece", read_piece)
    monkeypatch.setattr(tables, "HEAD_ROWS", rows)
    monkeypatch.setattr(tables, "SEGMENT_PIECES", 3)
    assert_equal(global_batches(config(data, decode_in=place), 1, 0, 10), alone)
    assert len(read) == mine


@pytest.mark.ray
def test_a_step_may_take_longer_than_ray_data_waits_for_progress(
    alone: list[dict], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray ends an execution that did nothing for half an hour; here, for a second."""
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 1.0)
    reader = make_reader(config(data), 0, 1)
    pieces = list(iter_pieces(reader.plan, 0, 40, 1))
    # So little room that what is not taken keeps other blocks from being read.
    share = dataclasses.replace(cluster_share(config(data), 1), object_store_bytes=1)
    blocks = tables._blocks(config(data), reader.part(pieces), pieces, share)
    with contextlib.closing(blocks):
        rows = next(blocks).num_rows
        time.sleep(3)
        rows += sum(block.num_rows for block in blocks)
    assert rows == 40 * len(alone[0]["sample_ids"])


@pytest.mark.ray
def test_limit_of_bytes_cuts_pieces_and_changes_nothing(
    alone: list[dict], data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(data)
    whole = make_reader(cfg, 0, 1)
    assert whole.plan.window_batches == 2
    assert whole.most_batches > 2
    # The mean is of stored images: a batch of 32 and half of one.
    monkeypatch.setattr(reading, "PIECE_BYTES", int(50 * whole.row_bytes))
    assert make_reader(cfg, 0, 1).most_batches == 1
    assert make_reader(cfg, 0, 2).most_batches == 3
    assert_equal(global_batches(cfg, 1, 0, 10), alone)


def test_row_groups_of_more_than_2_gib_together_are_read(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow's `binary` offsets end at 2 GiB. The zeros are never touched, so they are free."""
    row_bytes = 64 * 2**20
    held = []

    def read(fs: object, root: str, file: str, group: int, columns: tuple[str, ...]) -> pa.Table:
        table = read_row_group(fs, root, file, group, columns)
        rows = table.num_rows
        ends = pa.py_buffer(np.arange(0, (rows + 1) * row_bytes, row_bytes, dtype=np.int32))
        zeros = pa.py_buffer(np.zeros(rows * row_bytes, np.uint8))
        images = pa.Array.from_buffers(pa.binary(), rows, [None, ends, zeros])
        held.append(images.nbytes)
        return table.set_column(1, "image", images)

    monkeypatch.setattr(reading, "read_row_group", read)
    reader = make_reader(config(data), 0, 1)
    rows_N3 = np.array([[0, 3, 5], [1, 0, 2], [0, 0, 1], [0, 3, 4], [0, 1, 0]])
    table, index_N = reading._read_rows(reader, rows_N3)
    assert sum(held) > 2**31
    assert table.column("image").nbytes < 6 * row_bytes
    assert table.column("image").num_chunks == 1
    assert table.schema.field("image").type == pa.large_binary()  # or a batch would end at 2 GiB
    expected = [
        read_row_group(*open_uri(data), reader.files[s], g)["sample_id"][r].as_py()
        for s, g, r in rows_N3.tolist()
    ]
    assert table["sample_id"].take(pa.array(index_N)).to_pylist() == expected


@pytest.mark.ray
def test_seed_and_epoch_change_order_crops_and_masks(alone: list[dict], data: str) -> None:
    cfg = config(data)
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, seed=1))
    for other in (global_batches(cfg, 1, 0, 4), alone[4:8]):
        first = {s: i for i, s in enumerate(alone[0]["sample_ids"])}
        again = {s: (b, i) for b in other for i, s in enumerate(b["sample_ids"]) if s in first}
        assert other[0]["sample_ids"] != alone[0]["sample_ids"]
        moved = [
            (b["crop_boxes"][i] != alone[0]["crop_boxes"][first[s]]).any()
            and (b["context_ids"][i] != alone[0]["context_ids"][first[s]]).any()
            for s, (b, i) in again.items()
        ]
        assert len(moved) > 15
        assert np.mean(moved) > 0.8


@pytest.mark.ray
def test_legacy_masks_follow_the_global_batch(data: str, ray_local: None) -> None:
    cfg = config(data, mask=MaskConfig(truncate="legacy"))
    one, two = (global_batches(cfg, world_size, 2, 7) for world_size in (1, 2))
    assert_equal(two, one)
    assert len({batch["context_ids"].shape[1] for batch in one}) > 1
    assert_equal(global_batches(cfg, 1, 4, 7), one[2:])


# --- the cluster


@pytest.mark.ray
def test_workers_that_leave_a_quarter_cpu(alone: list[dict], data: str) -> None:
    """Actors in lockstep, in place of Ray Train's workers; they deadlock if shares overlap."""
    import ray

    @ray.remote(num_cpus=1.75)
    class Worker:
        def is_up(self) -> bool:
            return True

        def start(self, cfg: PretrainConfig, rank: int) -> None:
            torch.set_num_threads(1)
            tables.HEAD_ROWS = 0  # in this process too
            self.share = cluster_share(cfg, 2)
            self.batches = train_batches(cfg, rank=rank, world_size=2, start_step=0, end_step=10)

        def cpus(self) -> float:
            return self.share.cpus

        def next(self) -> dict:
            return next(self.batches)

    workers = [Worker.remote() for _ in range(2)]
    try:
        # Ray Train's workers hold their CPUs from the start, actors once they are up.
        assert all(ray.get([worker.is_up.remote() for worker in workers]))
        ray.get([worker.start.remote(config(data), rank) for rank, worker in enumerate(workers)])
        assert ray.get(workers[0].cpus.remote()) == pytest.approx(0.25)
        found = [
            join(ray.get([worker.next.remote() for worker in workers], timeout=90))
            for _ in range(10)
        ]
    finally:
        for worker in workers:
            ray.kill(worker)
    assert_equal(found, alone)


@pytest.mark.parametrize("count", [130])
def test_benchmark_pictures_and_plain_loader_still_work(tmp_path: Path, count: int) -> None:
    """The parts of benchmarks/data/loader.py that need no measurement still run."""
    import importlib.util

    path = ROOT / "benchmarks" / "data" / "loader.py"
    spec = importlib.util.spec_from_file_location("loader_benchmark", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.make_photos(tmp_path, count)
    files = sorted(tmp_path.glob("*.jpg"))
    assert len({file.read_bytes() for file in files}) == count
    assert {Image.open(file).size for file in files} == {(500, 400)}
    assert bench.Photos(files)[0].shape == (3, 224, 224)
    crop = np.zeros((3, 224, 224), np.uint8)
    bench.Photos(files).write_crop(1, np.full(4, 0.5), crop)
    assert crop.std() > 10
    before = bench.tree_cpu_seconds()
    sum(range(2_000_000))
    assert bench.tree_cpu_seconds() > before > 0
