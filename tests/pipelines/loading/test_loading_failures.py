"""The loader when it must fail (no CPU, damaged shards, impossible settings) or is closed early."""

from __future__ import annotations

import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from helpers.pipelines.loading import config, encode, picture, row_of, write_rows, write_samples
from helpers.waiting import LIMIT_S, wait_until
from pipelines.config.data import MaskConfig
from pipelines.config.train import PretrainConfig
from pipelines.dataset.shards import read_manifest
from pipelines.loading import cpu_share, prefetch, tables
from pipelines.loading.cpu_share import StarvedError
from pipelines.loading.decoding import DecodeError
from pipelines.loading.loader import train_batches
from pipelines.runtime.lines.worker_lines import SHARED


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_samples(tmp_path_factory.mktemp("shards"))


# --- the cluster


@pytest.mark.ray
def test_workers_that_leave_no_cpu_fail_at_once(data: str, ray_local: None) -> None:
    import ray

    @ray.remote(num_cpus=4)
    def work(cfg: PretrainConfig) -> None:
        next(train_batches(cfg, rank=0, world_size=1, start_step=0, end_step=1))

    with pytest.raises(StarvedError, match=r"--run\.cpus-per-worker"):
        ray.get(work.remote(config(data)), timeout=90)


@pytest.mark.ray
def test_cpus_taken_by_others_are_waited_for_and_told(
    data: str, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    lines: list[str] = []

    @ray.remote(num_cpus=4)
    class Hog:
        def hold(self) -> None:
            pass

    hog = Hog.remote()
    ray.get(hog.hold.remote())
    monkeypatch.setattr(cpu_share, "LOOK_SECONDS", 0.1)

    def say(line: str) -> None:
        lines.append(line)
        ray.kill(hog)

    batches = train_batches(config(data), rank=0, world_size=1, start_step=0, end_step=4, say=say)
    assert len(list(batches)) == 4
    assert lines[0] == "waiting for a CPU to read data with: others hold 4 of 4 CPUs (Hog 4)"
    assert SHARED.match(lines[0])  # of all workers, one says it


@pytest.mark.ray
def test_cpus_taken_later_are_told(
    data: str, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody holds them when the run begins."""
    import ray

    lines: list[str] = []
    release = threading.Event()
    monkeypatch.setattr(cpu_share, "TOLD_SECONDS", 0.2)
    monkeypatch.setattr(prefetch, "WATCH_SECONDS", 0.1)

    def slow() -> Generator[int]:
        yield 0
        release.wait(LIMIT_S)
        yield 1

    def say(line: str) -> None:
        lines.append(line)
        release.set()

    batches = prefetch.Prefetch(slow(), 2, cpu_share.DataWatch(3, say))
    assert list(batches) == [0, 1]
    assert lines[0].startswith("worker 3 has waited for data for 0 s: 4 CPUs are free, ")
    assert SHARED.match(lines[0])
    assert ray.is_initialized()


@pytest.mark.ray
@pytest.mark.parametrize("head_rows", [0, 8192])  # while Ray Data reads, and while it starts
def test_closing_early_frees_the_cluster(
    data: str, ray_local: None, monkeypatch: pytest.MonkeyPatch, head_rows: int
) -> None:
    import ray

    monkeypatch.setattr(tables, "HEAD_ROWS", head_rows)
    batches = train_batches(config(data), rank=0, world_size=1, start_step=0, end_step=100_000)
    next(batches)
    batches.close()
    wait_until(lambda: ray.available_resources().get("CPU") == 4, every_s=0.2)


# --- data and settings


@pytest.fixture(params=[0, 8192], ids=["by Ray Data", "by this process"])
def _reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "HEAD_ROWS", request.param)


@pytest.mark.ray
@pytest.mark.usefixtures("_reading")
@pytest.mark.parametrize("place", ["trainer", "data"])
def test_corrupt_image_names_the_sample(tmp_path: Path, ray_local: None, place: str) -> None:
    rows = [row_of(encode(picture(i, 20, 24), "JPEG"), f"file-{i}") for i in range(32)]
    rows[7]["image"] = rows[7]["image"][:-40]  # inside the pixels, past the headers
    data = write_rows(tmp_path, rows)
    with pytest.raises(DecodeError, match=rows[7]["sample_id"].hex() + r" \(file-7\): truncated"):
        list(
            train_batches(
                config(data, decode_in=place), rank=0, world_size=1, start_step=0, end_step=1
            )
        )


@pytest.mark.ray
@pytest.mark.usefixtures("_reading")
def test_missing_shard_surfaces(tmp_path: Path, ray_local: None) -> None:
    rows = [row_of(encode(picture(i, 20, 24), "PNG"), f"file-{i}") for i in range(32)]
    data = write_rows(tmp_path, rows)
    shard = read_manifest(data).shards[0].file
    (tmp_path / shard).unlink()
    with pytest.raises(Exception, match=shard):
        list(train_batches(config(data), rank=0, world_size=1, start_step=0, end_step=1))


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"batch_size": 160}, "--data.batch-size"),
        ({"mask": MaskConfig(context_keep=60)}, "--mask.context-keep"),
    ],
)
def test_impossible_settings_name_the_flag(data: str, change: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        next(train_batches(config(data, **change), rank=0, world_size=1, start_step=0, end_step=1))


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not ingested"):
        next(train_batches(config(str(tmp_path)), rank=0, world_size=1, start_step=0, end_step=1))


def test_no_steps(data: str) -> None:
    assert not list(train_batches(config(data), rank=0, world_size=1, start_step=5, end_step=5))
