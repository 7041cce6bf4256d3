"""S3 behind a proxy that refuses, resets and throttles: what is waited out, and what is not."""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.s3_proxy import S3Proxy, proxied
from models.file_systems import url_to_fs
from models.patient_s3 import PATIENCE_ENV

BUCKET = "patience"
DOWN_S = 4.0


@pytest.fixture(scope="module")
def through(s3: dict[str, str]) -> Iterator[S3Proxy]:
    with proxied(s3) as proxy:
        url_to_fs("s3://")[0].mkdir(BUCKET)
        yield proxy


@pytest.fixture
def proxy(through: S3Proxy) -> Iterator[S3Proxy]:
    through.error_rate = 0.0
    yield through
    through.error_rate = 0.0


def test_reading_writing_and_listing_wait_while_s3_refuses(proxy: S3Proxy, tmp_path: Path) -> None:
    fs, path = url_to_fs(f"s3://{BUCKET}/one")
    fs.pipe_file(path, b"before")
    (tmp_path / "local").write_bytes(b"local")
    for use in (
        lambda: fs.cat_file(path),
        lambda: fs.pipe_file(f"s3://{BUCKET}/two", b"x"),
        lambda: fs.put_file(str(tmp_path / "local"), f"s3://{BUCKET}/three"),
        lambda: fs.ls(f"s3://{BUCKET}"),
        lambda: fs.exists(path),
    ):
        timer = proxy.down_for(DOWN_S / 2)
        started = time.monotonic()
        use()
        assert time.monotonic() - started > DOWN_S / 4
        timer.join()
    assert fs.cat_file(path) == b"before"
    assert {p.rpartition("/")[2] for p in fs.ls(f"s3://{BUCKET}")} == {"one", "two", "three"}


def test_what_ray_train_uploads_through_is_patient_too(proxy: S3Proxy, tmp_path: Path) -> None:
    """Ray pickles the file system into workers, and pyarrow copies the checkpoint."""
    import pyarrow.fs

    from pipelines.runtime.uris import ray_storage

    path, filesystem = ray_storage(f"s3://{BUCKET}/runs")
    filesystem = pickle.loads(pickle.dumps(filesystem))
    (tmp_path / "model").write_bytes(random.randbytes(1_000_000))
    timer = proxy.down_for(DOWN_S)
    started = time.monotonic()
    local = pyarrow.fs.LocalFileSystem()
    pyarrow.fs.copy_files(
        str(tmp_path),
        f"{path}/checkpoint",
        source_filesystem=local,
        destination_filesystem=filesystem,
    )
    assert time.monotonic() - started > DOWN_S / 2
    timer.join()
    fs, at = url_to_fs(f"s3://{BUCKET}/runs/checkpoint/model")
    assert fs.cat_file(at) == (tmp_path / "model").read_bytes()


def test_a_tenth_of_errors_changes_no_byte(proxy: S3Proxy) -> None:
    fs, _ = url_to_fs("s3://")
    files = {f"{BUCKET}/many/{n}": random.Random(n).randbytes(10_000) for n in range(60)}
    proxy.reset()
    proxy.error_rate = 0.1
    for path, data in files.items():
        fs.pipe_file(path, data)
    assert {path: fs.cat_file(path, start=0, end=10_000) for path in files} == files
    assert set(fs.ls(f"{BUCKET}/many", detail=False)) == set(files)
    assert proxy.spoiled >= 6


def test_patience_ends(proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE_ENV, "1")
    fs, path = url_to_fs(f"s3://{BUCKET}/one")
    proxy.down()
    started = time.monotonic()
    with pytest.raises(Exception, match="Could not connect"):
        fs.cat_file(path)
    assert 1 < time.monotonic() - started < 20
    proxy.up()


def test_without_patience_the_first_failure_is_raised(proxy: S3Proxy) -> None:
    fs, path = url_to_fs(f"s3://{BUCKET}/one", patience_s=0)
    again = pickle.loads(pickle.dumps(fs))
    for impatient in (fs, again):
        proxy.down()
        started = time.monotonic()
        with pytest.raises(Exception, match="Could not connect"):
            impatient.cat_file(path)
        assert time.monotonic() - started < 3
        proxy.up()


def test_what_waiting_cannot_mend_is_raised_at_once(
    proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _ = url_to_fs("s3://")
    proxy.reset()
    started = time.monotonic()
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{BUCKET}/absent")
    with pytest.raises(FileNotFoundError):
        fs.pipe_file("no-such-bucket/x", b"x")
    for code in ("AccessDenied", "ExpiredToken", "InvalidAccessKeyId"):
        proxy.refuse = (403 if code != "ExpiredToken" else 400, code)
        with pytest.raises(OSError, match=code):
            fs.cat_file(f"{BUCKET}/one", start=0, end=1)
    proxy.refuse = None
    assert time.monotonic() - started < 5
    assert sum(proxy.requests.values()) <= 7  # none of them repeated; missing keys ask twice
