"""Ingest while S3 is away; checkpoints that are damaged; leases that were left behind."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import pytest

from helpers.cluster.cluster import RigCluster
from helpers.cluster.faults import RESTART_S
from helpers.cluster.report import record_job
from helpers.cluster.runs import check_samples, pretrain
from helpers.cluster.s3 import BUCKET, RigS3

pytestmark = pytest.mark.slow


def digest(s3: RigS3, prefix: str) -> dict[str, str]:
    """SHA-256 of all files below a prefix, by name."""
    files = s3.files()
    paths = files.find(f"{BUCKET}/{prefix}")
    return {
        path.rpartition("/")[2]: hashlib.sha256(files.cat_file(path)).hexdigest()
        for path in paths
        if path.endswith(".parquet")
    }


def test_s3_is_away_and_faulty_during_ingest(cluster: RigCluster, s3: RigS3, shards: str) -> None:
    """Refused connections for 60 s, then 10% of requests spoiled: the same shards, byte by byte."""
    source, out = f"s3://{BUCKET}/pictures", f"s3://{BUCKET}/shards/again"
    job = cluster.start_job(
        "ingest-again",
        *("python", "pipelines/ingest.py", "--source", source, "--out", out),
        *("--row-group-rows", "32"),
    )
    before = s3.proxy.count("GET")
    while s3.proxy.count("GET") < before + 5:  # it has begun to read
        assert job.status() in ("PENDING", "RUNNING")
        time.sleep(0.05)
    s3.proxy.reset()
    s3.proxy.begin_trouble(0.1, "reset", "slow_down")
    s3.proxy.down()
    started = time.monotonic()
    time.sleep(60)
    s3.proxy.up()
    assert job.wait_for_end(RESTART_S) == "SUCCEEDED", job.log()
    seconds = time.monotonic() - started
    s3.proxy.end_trouble()
    same = digest(s3, "shards/again") == digest(s3, "shards/pictures")
    record_job(
        "5b",
        "S3 refuses connections for 60 s, then 10% of requests fail, in ingest",
        f"ingest goes on; {s3.proxy.spoiled} requests spoiled; shards equal: {same}",
        "nothing" if same else "shards differ",
        seconds,
        job.log(),
        "test_s3_is_away_and_faulty_during_ingest",
    )
    assert same


def test_damaged_checkpoints(cluster: RigCluster, s3: RigS3, shards: str) -> None:
    """The newest is cut, the one before has one bit flipped, and Ray Train's list is cut."""
    command = pretrain(shards, "damaged", "--run.keep-checkpoints", "4")
    cluster.job(*command, "--run.stop-after", "80")
    files, run = s3.files(), f"{BUCKET}/runs/damaged"

    def change(path: str, edit: Callable[[bytes], bytes]) -> None:
        (found,) = files.glob(f"{run}/{path}")
        files.pipe_file(found, edit(files.cat_file(found)))

    change("checkpoint_00000080/model-00000-of-*.safetensors", lambda data: data[:-100])
    files.rm(files.glob(f"{run}/checkpoint_00000060/optimizer-00001-of-*.safetensors"))
    change(
        "checkpoint_00000040/model-00000-of-*.safetensors",
        lambda data: data[:-6] + bytes([data[-6] ^ 0x10]) + data[-5:],
    )
    change("checkpoint_manager_snapshot.json", lambda data: data[:60])
    started = time.monotonic()
    printed = cluster.job(*command, "--run.stop-after", "100")
    assert "resuming run 'damaged' at step 20" in printed
    record_job(
        "10",
        "newest checkpoint cut, next without a file, next with one bit flipped, list cut",
        "the run goes on from the newest whole checkpoint",
        "60 steps repeated",
        time.monotonic() - started,
        printed,
        "test_damaged_checkpoints",
    )
    check_samples(s3, "damaged", 100)
