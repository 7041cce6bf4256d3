"""Ingest from S3 to S3 while S3 refuses for seconds, or fails a tenth of requests."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.s3_proxy import S3Proxy, proxied
from models.file_systems import url_to_fs
from pipelines.config.ingest import IngestConfig
from pipelines.dataset.shards import read_manifest, verify_shards
from pipelines.ingest import ingest

COUNT = 40
SOURCE = "s3://hiccups/raw"


@pytest.fixture
def proxy(each_s3: dict[str, str], in_process: None) -> Iterator[S3Proxy]:
    with proxied(each_s3) as proxy:
        fs, path = url_to_fs(SOURCE)
        fs.makedirs("hiccups", exist_ok=True)
        for number in range(COUNT):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            fs.pipe_file(f"{path}/{number % 4}/{number}.png", file.getvalue())
        yield proxy


def ingested(name: str) -> list[str]:
    """Ingests to a place of its own; returns the digests of the shards."""
    out = f"s3://hiccups/{name}"
    ingest(IngestConfig(source=SOURCE, out=out, row_group_rows=8, shard_bytes=20_000))
    manifest = verify_shards(out)
    assert (manifest.num_samples, manifest.quarantined) == (COUNT, {})
    assert read_manifest(out).shards == manifest.shards
    return [shard.blake2b for shard in manifest.shards]


def test_shards_are_the_same_whatever_s3_does(proxy: S3Proxy) -> None:
    expected = ingested("calm")
    assert len(expected) > 2
    proxy.reset()
    proxy.error_rate = 0.1
    assert ingested("errors") == expected
    assert proxy.spoiled >= 5
    proxy.error_rate = 0.0

    proxy.reset()
    down: list[threading.Timer] = []

    def go_down() -> None:
        """Once some pictures have been read."""
        while proxy.count("GET") < COUNT // 4:
            threading.Event().wait(0.01)
        down.append(proxy.down_for(3))

    threading.Thread(target=go_down, daemon=True).start()
    assert ingested("outage") == expected
    assert down
    down[0].join()


@pytest.mark.parametrize("code", ["ExpiredToken", "RequestTimeTooSkewed", "InvalidAccessKeyId"])
def test_credentials_that_end_meanwhile_are_no_fault_of_the_images(
    proxy: S3Proxy, code: str
) -> None:
    proxy.rule = lambda r: code * (r.command == "GET" and r.path.endswith("7.png"))
    with pytest.raises(PermissionError, match=rf"\({code}: s3://hiccups/raw/"):
        ingested(code)
    fs, path = url_to_fs(f"s3://hiccups/{code}")
    assert not [name for name in fs.find(path) if name.endswith("items.parquet")]


def test_an_image_that_may_not_be_read_is_quarantined_by_itself(proxy: S3Proxy) -> None:
    proxy.rule = lambda r: "AccessDenied" * (r.command == "GET" and r.path.endswith("/7.png"))
    manifest = ingest(IngestConfig(source=SOURCE, out="s3://hiccups/denied"))
    assert (manifest.num_samples, manifest.quarantined) == (COUNT - 1, {"unreadable": 1})


def test_an_image_that_vanishes_after_it_was_listed_is_quarantined(proxy: S3Proxy) -> None:
    def vanish(request: Any) -> str:
        if request.command == "GET" and request.path.endswith("/7.png"):
            return "NoSuchKey"
        return ""

    proxy.rule = vanish
    manifest = ingest(IngestConfig(source=SOURCE, out="s3://hiccups/vanished"))
    assert (manifest.num_samples, manifest.quarantined) == (COUNT - 1, {"unreadable": 1})
