"""Listing and reading a bucket: time, requests, progress, ctrl-C, and keys of any shape."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from moto.backends import get_backend
from PIL import Image
from rich.console import Console

from helpers.repository import ROOT
from helpers.s3_proxy import LONGEST_HANG_S, S3Proxy, proxied
from models.file_systems import url_to_fs
from models.patient_s3 import PatientS3FileSystem
from pipelines.config.ingest import IngestConfig
from pipelines.dataset.shards import read_rows
from pipelines.ingest import ingest
from pipelines.ingestion.sources.registry import list_source
from pipelines.runtime import progress

BUCKET = "listing"


@pytest.fixture(scope="module")
def proxy(s3: dict[str, str]) -> Iterator[S3Proxy]:
    with proxied(s3) as proxy:
        url_to_fs("s3://")[0].mkdir(BUCKET)
        yield proxy


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def listing_cpu_s(fs: Any, folders: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """CPU time of a listing with a file in each folder, without that of the requests."""

    async def pages(self: Any, method: str, **_: Any) -> AsyncIterator[dict[str, Any]]:
        for first in range(0, folders, 1000):
            keys = [f"raw/{n:07d}/a.png" for n in range(first, first + 1000)]
            yield {"Contents": [{"Key": key, "Size": 1, "ETag": "x"} for key in keys]}

    with monkeypatch.context() as patch:
        patch.setattr(PatientS3FileSystem, "_list_pages", pages)
        started = time.process_time()
        assert len(fs.find("b/raw", detail=True)) == folders
        return time.process_time() - started


def test_time_grows_with_the_number_of_files_and_not_with_its_square(
    proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _ = url_to_fs("s3://")
    few, many = (listing_cpu_s(fs, n, monkeypatch) for n in (10_000, 80_000))
    assert many < 25 * max(few, 0.01)  # s3fs takes 60 times as long


def test_a_thousand_files_cost_one_request(proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    server = get_backend("s3")["123456789012"]["aws"]  # past HTTP, which takes a minute
    for n in range(2_001):
        server.put_object(BUCKET, f"many/c{n % 7}/{n}.png", b"x")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    proxy.reset()
    shown = io.StringIO()
    with progress.counting(Console(file=shown), "listing", "files") as count:
        listing = list_source(IngestConfig(source=f"s3://{BUCKET}/many", out="/o"), count)
    assert listing.num_items == 2_001
    assert shown.getvalue().split("\n")[:3] == [
        f"listing  {count} files" for count in ("1,000", "2,000", "2,001")
    ]
    assert sum(proxy.requests.values()) <= 4


ODD = {
    "cats/a b.png": "cats",
    "cats/a+b.png": "cats",
    "cats/100%.png": "cats",
    "cats/a%20b.png": "cats",
    "dogs/#1.png": "dogs",
    "dogs/what?.png": "dogs",
    "dogs/x&y=z;.png": "dogs",
    "dogs//double.png": "dogs",
    "dogs/~[1]*.png": "dogs",
    "Ünïcödé 日本/é.png": "Ünïcödé 日本",
    "Ünïcödé 日本/'\"\\.png": "Ünïcödé 日本",
}


@pytest.mark.parametrize("versioned", [False, True])
def test_keys_of_any_shape_are_read_with_their_classes(
    proxy: S3Proxy, in_process: None, versioned: bool
) -> None:
    """Beside them an empty object, markers of folders, a hidden file, and what was deleted."""
    fs, _ = url_to_fs("s3://")
    bucket = f"odd-{versioned}".lower()
    fs.mkdir(bucket)
    if versioned:
        fs.make_bucket_versioned(bucket)
        for key in ODD:  # older versions
            fs.pipe_file(f"{bucket}/raw/{key}", b"old")
        fs.pipe_file(f"{bucket}/raw/cats/gone.png", png(99))
        fs.rm_file(f"{bucket}/raw/cats/gone.png")
    for number, key in enumerate(ODD):
        fs.call_s3("put_object", Bucket=bucket, Key=f"raw/{key}", Body=png(number))
    for key in ("raw/", "raw/cats/", "raw/none/", "raw/cats/empty.png", "raw/dogs/.hidden.png"):
        fs.call_s3("put_object", Bucket=bucket, Key=key, Body=b"")
    source, out = f"s3://{bucket}/raw", f"s3://{bucket}/out dir/a+b %20#"
    manifest = ingest(IngestConfig(source=source, out=out))
    assert manifest.num_samples == len(ODD)
    assert manifest.quarantined == {"empty": 1}
    rows = read_rows(out, columns=["source_uri", "label"]).to_pylist()
    found = {row["source_uri"].removeprefix(f"{source}/"): row["label"] for row in rows}
    assert {key: manifest.classes[label] for key, label in found.items()} == ODD
    below = {
        path.removeprefix(f"{bucket}/out dir/a+b %20#/") for path in fs.find(f"{bucket}/out dir")
    }
    assert below == {"manifest.json", "quarantine.parquet", *(s.file for s in manifest.shards)}
    again = ingest(IngestConfig(source=source, out=out))
    assert again.to_json() == manifest.to_json()  # it is up to date


def test_ctrl_c_ends_a_listing_that_waits(proxy: S3Proxy) -> None:
    fs, _ = url_to_fs("s3://")
    fs.pipe_file(f"{BUCKET}/waits/a.png", b"x")
    listing = threading.Event()

    def hang(request: Any) -> str:
        """A list of everything is never answered; one of a folder, to see what is there, is."""
        if "list-type=2" not in request.path or "delimiter=%2F" in request.path:
            return ""
        listing.set()
        return "hang"

    proxy.rule = hang
    places = ("--source", f"s3://{BUCKET}/waits", "--out", f"s3://{BUCKET}/waits-out")
    job = subprocess.Popen(
        [sys.executable, "-m", "pipelines.ingest", *places],
        cwd=ROOT,
        env=os.environ.copy(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert listing.wait(120)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=LONGEST_HANG_S)  # before there is an answer
    proxy.end_trouble()
    assert said == "error: interrupted; the same command goes on from what is done\n"
    assert job.returncode == 1
