"""S3 behind a proxy that refuses, resets and throttles: what is waited out, and what is not."""

from __future__ import annotations

import logging
import pickle
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from helpers.s3_proxy import S3Proxy, proxied
from helpers.waiting import wait_until
from models import patient_s3, s3_waiting
from models.file_systems import url_to_fs
from models.patient_s3 import PATIENCE_ENV

BUCKET = "patience"
DOWN_S = 2.0


@pytest.fixture(scope="module")
def through(each_s3: dict[str, str]) -> Iterator[S3Proxy]:
    with proxied(each_s3) as proxy:
        url_to_fs("s3://")[0].mkdir(BUCKET)
        yield proxy


@pytest.fixture
def proxy(through: S3Proxy) -> Iterator[S3Proxy]:
    through.end_trouble()
    yield through
    through.refuse = None
    through.end_trouble()


@pytest.fixture
def only_moto(request: pytest.FixtureRequest) -> None:
    """For what rclone does otherwise than S3: it has one key; an upload in parts is listed nowhere,
    and is known by another ETag when it is completed."""
    if request.node.callspec.params["each_s3"] != "moto":
        pytest.skip("rclone does this otherwise than S3")


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
        started = time.monotonic()
        timer = proxy.down_for(DOWN_S / 2)
        use()
        assert time.monotonic() - started > DOWN_S / 2
        timer.join()
    assert fs.cat_file(path) == b"before"
    assert {p.rpartition("/")[2] for p in fs.ls(f"s3://{BUCKET}")} == {"one", "two", "three"}


@pytest.mark.parametrize("trouble", ["hang", "slow_down", "reset", "cut", "late", "trickle"])
def test_reading_writing_and_listing_outlast(
    proxy: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """Also where the body of an answer breaks off: that of a file, a range, a page of a list."""
    monkeypatch.setitem(patient_s3.CONFIG, "read_timeout", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    fs, path = url_to_fs(f"s3://{BUCKET}/{trouble}/one")
    data = random.randbytes(100_000)
    fs.pipe_file(path, data)
    fs.ls(BUCKET)  # known to its client
    timer = proxy.trouble_for(1.5, trouble)
    assert fs.cat_file(path) == data
    assert fs.cat_file(path, start=10, end=90_000) == data[10:90_000]
    fs.get_file(path, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == data
    with fs.open(path, "rb") as file:
        assert file.read() == data
    with fs.open(f"{path}-written", "wb") as file:
        file.write(data)
    assert fs.find(f"{BUCKET}/{trouble}") == [path, f"{path}-written"]
    timer.join()
    assert proxy.spoiled
    assert fs.cat_file(f"{path}-written") == data


def test_the_user_hears_once_of_an_outage_and_once_of_its_end(
    proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(s3_waiting, "SAY_AFTER_S", 1.0)
    monkeypatch.delenv(PATIENCE_ENV, raising=False)
    fs, _ = url_to_fs("s3://")
    paths = [f"{BUCKET}/told/{n}" for n in range(20)]
    fs.pipe(dict.fromkeys(paths, b"x"))

    def come_back() -> None:
        wait_until(lambda: caplog.messages)
        proxy.up()

    proxy.down()
    back = threading.Thread(target=come_back)
    back.start()
    with caplog.at_level(logging.WARNING):
        assert fs.cat_ranges(paths, None, None, on_error="raise") == [b"x"] * 20
    back.join()
    waiting, answers = caplog.messages
    assert waiting.startswith(f"waiting for S3: no answer from {proxy.url} since ")
    assert waiting.endswith("gives up after 300 s (RAYJEPA_S3_PATIENCE_S)")
    assert answers.startswith(f"S3 answers again: {proxy.url}, after ")


def test_small_files_cost_one_request_each(proxy: S3Proxy) -> None:
    fs, _ = url_to_fs("s3://")
    paths = [f"{BUCKET}/small/{n}" for n in range(10)]
    fs.pipe({path: path.encode() for path in paths})
    fs.pipe_file(f"{BUCKET}/small/empty", b"")
    proxy.reset()
    assert fs.cat_ranges(paths, None, None) == [path.encode() for path in paths]
    assert fs.cat_file(f"{BUCKET}/small/empty") == b""
    assert fs.cat_file(f"{BUCKET}/small/empty", start=-8) == b""
    assert (proxy.count("GET"), proxy.count("HEAD")) == (12, 0)


def test_large_files_are_read_in_blocks(proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, path = url_to_fs(f"s3://{BUCKET}/large")
    data = random.randbytes(1_000_000)
    fs.pipe_file(path, data)
    monkeypatch.setattr(fs, "default_block_size", 300_000)
    proxy.reset()
    assert fs.cat_file(path) == data
    assert proxy.count("GET") == 5  # of which one told the size


def test_what_ray_train_uploads_through_is_patient_too(proxy: S3Proxy, tmp_path: Path) -> None:
    """Ray pickles the file system into workers, and pyarrow copies the checkpoint."""
    import pyarrow.fs

    from pipelines.runtime.uris import ray_storage

    path, filesystem = ray_storage(f"s3://{BUCKET}/runs")
    filesystem = pickle.loads(pickle.dumps(filesystem))
    (tmp_path / "model").write_bytes(random.randbytes(1_000_000))
    started = time.monotonic()
    timer = proxy.down_for(DOWN_S)
    local = pyarrow.fs.LocalFileSystem()
    pyarrow.fs.copy_files(
        str(tmp_path),
        f"{path}/checkpoint",
        source_filesystem=local,
        destination_filesystem=filesystem,
    )
    assert time.monotonic() - started > DOWN_S
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
    assert 1 < time.monotonic() - started < 60  # and not its patience of 300
    proxy.up()


def test_without_patience_the_first_failure_is_raised(proxy: S3Proxy) -> None:
    fs, path = url_to_fs(f"s3://{BUCKET}/one", patience_s=0)
    again = pickle.loads(pickle.dumps(fs))
    for impatient in (fs, again):
        proxy.down()
        started = time.monotonic()
        with pytest.raises(Exception, match="Could not connect"):
            impatient.cat_file(path)
        assert time.monotonic() - started < 60  # and not its patience of 300
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
    for code in REFUSALS:
        proxy.refuse = (403 if "Token" not in code else 400, code)
        with pytest.raises(OSError, match=rf"{code}: s3://{BUCKET}/one\)"):
            fs.cat_file(f"{BUCKET}/one", start=0, end=1)
    proxy.refuse = None
    assert time.monotonic() - started < 60  # and not its patience of 300
    assert sum(proxy.requests.values()) <= 2 + len(REFUSALS)  # none of them repeated


REFUSALS = ("AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "RequestTimeTooSkewed")


@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.parametrize("path", [BUCKET, f"{BUCKET}/one"])
def test_a_head_says_why_it_is_refused(proxy: S3Proxy, path: str, code: str) -> None:
    """Its answer has a status and no code; a bucket would be taken for missing."""
    fs, _ = url_to_fs("s3://")
    proxy.refuse = (403 if "Token" not in code else 400, code)
    if (path, code) == (BUCKET, "AccessDenied"):
        assert fs.exists(path)  # somebody else's is there
        return
    with pytest.raises(OSError, match=rf"{code}: s3://{path}\)"):
        fs.exists(path)


def test_errors_name_code_and_object_in_other_processes_too(proxy: S3Proxy) -> None:
    fs, path = url_to_fs(f"s3://{BUCKET}/absent")
    with pytest.raises(FileNotFoundError) as caught:
        fs.cat_file(path)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is FileNotFoundError
    assert str(again).endswith(f"(NoSuchKey: s3://{BUCKET}/absent)")


@pytest.mark.usefixtures("only_moto")
def test_credentials_that_are_renewed_on_the_disk_go_on(
    proxy: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "credentials"
    template = "[default]\naws_access_key_id = {0}\naws_secret_access_key = {0}\n"
    keys.write_text(template.format("old"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    s3fs.S3FileSystem.clear_instance_cache()
    fs, path = url_to_fs(f"s3://{BUCKET}/renewed")
    fs.pipe_file(path, b"x")
    proxy.rule = lambda r: "ExpiredToken" * ("=old/" in r.headers["Authorization"])
    with pytest.raises(PermissionError, match="ExpiredToken"):
        fs.cat_file(path)
    keys.write_text(template.format("new"))
    assert fs.cat_file(path) == b"x"
    s3fs.S3FileSystem.clear_instance_cache()


PART = 5 * 2**20


@pytest.mark.usefixtures("only_moto")
@pytest.mark.parametrize("request_", ["POST uploads", "POST uploadId", "PUT partNumber"])
def test_an_upload_in_parts_outlasts_the_loss_of_an_answer(proxy: S3Proxy, request_: str) -> None:
    method, query = request_.split()
    fs, path = url_to_fs(f"s3://{BUCKET}/parts/file")
    data = random.Random(0).randbytes(2 * PART + 100)
    left = [1]

    def lose_one(request: Any) -> str:
        """The first one of its kind is done, and nobody hears of it."""
        fits = request.command == method and query in request.path
        return "late" if fits and left and left.pop() else ""

    proxy.rule = lose_one
    fs.pipe_file(path, data, chunksize=PART)
    assert not left
    assert fs.cat_file(path) == data
    begun_twice = int(query == "uploads")
    assert len(unfinished(fs)) == begun_twice
    assert fs.abort_uploads(f"{BUCKET}/elsewhere") == 0
    assert fs.abort_uploads(f"{BUCKET}/parts") == begun_twice
    assert not unfinished(fs)
    assert fs.cat_file(path) == data


def unfinished(fs: Any) -> list[Any]:
    found: list[Any] = fs.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads", [])
    return found


def test_an_upload_that_fails_leaves_no_parts(proxy: S3Proxy) -> None:
    fs, path = url_to_fs(f"s3://{BUCKET}/parts/refused")
    proxy.rule = lambda r: "AccessDenied" * ("partNumber=2" in r.path)
    with pytest.raises(PermissionError):
        fs.pipe_file(path, random.Random(1).randbytes(3 * PART), chunksize=PART)
    assert not fs.exists(path)
    assert not unfinished(fs)
