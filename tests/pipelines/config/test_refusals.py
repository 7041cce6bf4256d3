"""What people get wrong on a command line is told in three lines: the flag, the value, the way out.

Every command's own `main`, in this process, with S3 by moto; only what a worker meets needs Ray.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import s3fs
from PIL import Image

from helpers.pipelines.refusals import Told, teller
from helpers.s3_proxy import proxied


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """Runs a command line that must be refused; returns what it says on stderr."""
    return teller(monkeypatch, capsys)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def bucket(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket with a picture; this process's environment leads to it."""
    for key, value in s3.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    fs = fsspec.filesystem("s3")
    fs.makedirs("refusals", exist_ok=True)
    fs.pipe_file("refusals/raw/a.png", b"x")
    yield "refusals"
    s3fs.S3FileSystem.clear_instance_cache()


HERE = "{pictures}"
# Every command that reads or writes places: its arguments, with PLACE for the flag that is wrong.
READS: list[tuple[str, str, list[str]]] = [
    ("adapt", "--from", ["--data.train", HERE]),
    ("ingest", "--source", ["--out", "{out}"]),
    ("embed", "--artifact", ["--data", HERE, "--out", "{out}"]),
    ("embed", "--data", ["--artifact", HERE, "--out", "{out}"]),
    ("evaluate", "--checkpoint", ["--data", HERE, "--test", HERE, "--out", "{out}"]),
    ("evaluate", "--data", ["--checkpoint", HERE, "--test", HERE, "--out", "{out}"]),
    ("evaluate", "--test", ["--checkpoint", HERE, "--data", HERE, "--out", "{out}"]),
    ("export", "--checkpoint", ["--out", "{out}"]),
    ("pretrain", "--data.train", ["--run.storage", "{out}"]),
    ("sweep", "--data.train", ["--out", "{out}", "--space", "optim.lr=1,2"]),
    ("perplexity", "--text", ["--model", HERE]),
]
WRITES: list[tuple[str, str, list[str]]] = [
    ("ingest", "--out", ["--source", HERE]),
    ("embed", "--out", ["--artifact", HERE, "--data", HERE]),
    ("evaluate", "--out", ["--checkpoint", HERE, "--data", HERE, "--test", HERE]),
    ("export", "--out", ["--checkpoint", HERE]),
    ("pretrain", "--run.storage", ["--data.train", HERE]),
    ("sweep", "--out", ["--data.train", HERE, "--space", "optim.lr=1,2"]),
    ("demo", "--out", []),
    ("fetch", "--out", ["sample"]),
]
LOCAL_ONLY = ("demo", "fetch")


def command_line(
    command: str, flag: str, value: object, others: list[str], pictures: Path
) -> list[str]:
    first = ["debug"] if command in ("pretrain", "sweep") else []
    filled = [o.format(pictures=pictures, out=pictures.parent / "out") for o in others]
    if filled[:1] == ["sample"]:
        return [*filled, flag, str(value)]
    return [*first, flag, str(value), *filled]


def ids(cases: list[tuple[str, str, list[str]]]) -> list[str]:
    return [f"{command} {flag}" for command, flag, _ in cases]


@pytest.mark.parametrize(("command", "flag", "others"), READS, ids=ids(READS))
def test_what_is_not_there(
    told: Told, pictures: Path, command: str, flag: str, others: list[str]
) -> None:
    missing = pictures.parent / "nothing"
    said = told(command, *command_line(command, flag, missing, others, pictures))
    assert flag in said
    assert str(missing) in said
    assert not (pictures.parent / "out").exists()


@pytest.mark.parametrize(("command", "flag", "others"), WRITES, ids=ids(WRITES))
def test_a_file_where_a_folder_must_be(
    told: Told, pictures: Path, command: str, flag: str, others: list[str]
) -> None:
    file = pictures / "0.png"
    for out in (file, file / "below"):
        said = told(command, *command_line(command, flag, out, others, pictures))
        assert flag in said
        assert str(out) in said
        assert "folder" in said
    assert file.is_file()


@pytest.mark.parametrize(("command", "flag", "others"), WRITES, ids=ids(WRITES))
def test_a_folder_that_cannot_be_written(
    told: Told, pictures: Path, command: str, flag: str, others: list[str]
) -> None:
    said = told(command, *command_line(command, flag, "/proc/x/y", others, pictures))
    assert f"{flag}: /proc/x/y: " in said


S3_WRITES = [case for case in WRITES if case[0] not in LOCAL_ONLY]


@pytest.mark.parametrize(
    ("command", "flag", "others"), READS[:-1] + S3_WRITES, ids=ids(READS[:-1] + S3_WRITES)
)
def test_a_bucket_that_does_not_exist(
    told: Told, pictures: Path, bucket: str, command: str, flag: str, others: list[str]
) -> None:
    said = told(command, *command_line(command, flag, "s3://nobucket/x", others, pictures))
    assert f"{flag}: s3://nobucket/x: there is no bucket" in said
    assert not fsspec.filesystem("s3", skip_instance_cache=True).exists("nobucket")


PROTOCOLS = {
    "gs": "pip install gcsfs",
    "az": "pip install adlfs",
    "abfss": "pip install adlfs",
    "S3": "write s3://",
    "r2": "nothing here reads r2://",
}


@pytest.mark.parametrize(
    ("command", "flag", "others"), READS[:-1] + S3_WRITES, ids=ids(READS[:-1] + S3_WRITES)
)
def test_protocols_that_are_not_read(
    told: Told, pictures: Path, command: str, flag: str, others: list[str]
) -> None:
    for protocol, way_out in PROTOCOLS.items():
        if importlib.util.find_spec(way_out.rpartition(" ")[2]):
            continue  # somebody has it installed
        address = f"{protocol}://b/x"
        said = told(command, *command_line(command, flag, address, others, pictures))
        assert f"{flag}: {address}: " in said
        assert way_out in said
        assert "s3://" in said


REFUSALS = {
    "ExpiredToken": (400, "refuses the credentials", "aws sso login"),
    "InvalidAccessKeyId": (403, "refuses the credentials", "AWS_ACCESS_KEY_ID"),
    "SignatureDoesNotMatch": (403, "refuses the credentials", "AWS_SECRET_ACCESS_KEY"),
    "AccessDenied": (403, "access denied", "may not do this there"),
    "RequestTimeTooSkewed": (403, "the clock of this machine is wrong", "timedatectl"),
    "PermanentRedirect": (301, "in another region", "AWS_DEFAULT_REGION"),
    "AuthorizationHeaderMalformed": (400, "in another region", "AWS_DEFAULT_REGION"),
}


@pytest.mark.parametrize("code", REFUSALS)
@pytest.mark.parametrize("flag", ["--source", "--out"])
def test_what_s3_refuses_is_told_at_once(
    told: Told, pictures: Path, s3: dict[str, str], bucket: str, code: str, flag: str
) -> None:
    status, what, way_out = REFUSALS[code]
    with proxied(s3) as proxy:
        proxy.refuse = (status, code)
        place = f"s3://{bucket}/raw"
        others = ("--out", pictures.parent / "o") if flag == "--source" else ("--source", pictures)
        started = time.monotonic()
        said = told("ingest", flag, place, *others)
        assert time.monotonic() - started < 60  # and not its patience of 300
    assert said.startswith(f"error: {flag}: {place}: ")
    assert what in said
    assert way_out in said


def test_an_endpoint_without_a_protocol(
    told: Told, pictures: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    s3fs.S3FileSystem.clear_instance_cache()
    said = told("ingest", "--source", f"s3://{bucket}/raw", "--out", pictures.parent / "out")
    assert "--source: s3://refusals/raw: " in said
    assert "AWS_ENDPOINT_URL" in said
    assert "localhost:9000" in said


def test_no_credentials(
    told: Told, pictures: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in [key for key in os.environ if key.startswith("AWS_") and "ENDPOINT" not in key]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    said = told("ingest", "--source", pictures, "--out", f"s3://{bucket}/x")
    assert f"--out: s3://{bucket}/x: no credentials for S3" in said
    assert "AWS_ACCESS_KEY_ID" in said
    said = told("ingest", "--source", f"s3://{bucket}/raw", "--out", pictures.parent / "out")
    assert f"--source: s3://{bucket}/raw: no credentials for S3" in said


def test_an_endpoint_that_is_dead(
    told: Told, pictures: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        dead = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", dead)
        s3fs.S3FileSystem.clear_instance_cache()
        said = told("ingest", "--source", pictures, "--out", f"s3://{bucket}/x")
    assert f"--out: s3://{bucket}/x: no answer from {dead}" in said
    assert "AWS_ENDPOINT_URL" in said


@pytest.mark.parametrize("flag", ["--source", "--out"])
def test_a_place_that_is_given_empty_is_not_the_folder_one_is_in(
    flag: str, told: Told, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"--source": pictures, "--out": tmp_path / "out", flag: ""}
    said = told("ingest", *(part for pair in given.items() for part in pair))
    assert said.startswith(f"error: {flag}: it is empty")
    assert not list(tmp_path.glob("manifest.json"))
