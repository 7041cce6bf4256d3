"""The lease on a run's folder, on a disk and on S3: who gets it, who is refused, who must stop."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from helpers.repository import ROOT
from helpers.s3_proxy import S3Proxy, proxied
from helpers.waiting import wait_until
from models.file_systems import url_to_fs
from models.s3_errors import passes
from pipelines.runs import lease as leases
from pipelines.runs.lease import (
    BEAT_ENV,
    NAME,
    Holder,
    Lease,
    RunInUseError,
    check_token,
    held,
    this_process,
)
from pipelines.runs.lease_file import S3LeaseFile, TakenError, lease_file

BEAT = 0.4


@pytest.fixture(scope="module")
def proxy(s3: dict[str, str]) -> Iterator[S3Proxy]:
    with proxied(s3) as proxy:
        url_to_fs("s3://")[0].mkdir("leases")
        yield proxy


@pytest.fixture(params=["disk", "s3"])
def run(
    request: pytest.FixtureRequest,
    proxy: S3Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    monkeypatch.setenv(BEAT_ENV, str(BEAT))
    monkeypatch.setattr(leases, "STALE_BEATS", 1_000)  # nobody is dead who is only slow
    return str(tmp_path / "run") if request.param == "disk" else f"s3://leases/{tmp_path.name}"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Holder]]:
    """Makes this process another one on another machine, until `back` is called."""

    def pretend(**fields: object) -> Holder:
        other = dataclasses.replace(
            this_process(), **{"host": "far", "machine": f"other {fields}", "pid": 7, **fields}
        )
        monkeypatch.setattr(leases, "this_process", lambda: other)
        return other

    yield pretend
    monkeypatch.undo()


def silent(line: str) -> None:
    pytest.fail(f"nothing is to be said: {line}")


def lines_of(error: pytest.ExceptionInfo[RunInUseError]) -> list[str]:
    lines = str(error.value).splitlines()
    assert len(lines) <= 3
    return lines


def test_a_second_job_is_refused_in_three_lines(run: str) -> None:
    with held(run, take_over=False, say=silent) as lease:
        time.sleep(2 * BEAT)
        with pytest.raises(RunInUseError) as error:
            Lease(run, take_over=False, say=silent)
        first, second, third = lines_of(error)
        assert first.startswith(f"run {run} is in use by process {lease.me.pid} on {lease.me.host}")
        assert lease.me.since in first
        assert "--run.name" in second
        assert "--run.take-over" in third
        lease.require()
    with held(run, take_over=False, say=silent):  # as soon as it has ended
        pass
    assert lease_file(f"{run}/{NAME}").read() is None


def test_of_many_at_once_one_gets_it(run: str) -> None:
    got: list[Lease] = []
    refused: list[str] = []

    def ask() -> None:
        try:
            got.append(Lease(run, take_over=False, say=silent))
        except RunInUseError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 5)
    got[0].release()


def test_the_older_one_stops_at_its_next_heartbeat(run: str) -> None:
    older = Lease(run, take_over=False, say=silent)
    assert check_token(run, older.token) is None
    said: list[str] = []
    newer = Lease(run, take_over=True, say=said.append)
    assert len(said) == 1
    assert "taking over the run from process" in said[0]
    wait_until(lambda: older._lost is not None)
    with pytest.raises(RunInUseError, match="was taken over by process") as error:
        older.require()
    lines_of(error)
    assert newer.me.since in str(check_token(run, older.token))
    older.release()
    newer.require()  # what the older one does at its end takes nothing from the newer
    assert lease_file(f"{run}/{NAME}").read() is not None
    newer.release()


def test_a_lease_without_heartbeats_is_taken_over_with_a_line(
    run: str, elsewhere: Callable[..., Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = elsewhere(since="2001-01-01 00:00:00 UTC")
    lease_file(f"{run}/{NAME}").create(leases._text(dead))
    monkeypatch.setattr(leases, "this_process", this_process)
    with pytest.raises(RunInUseError):  # its clock says 2001, but the storage says just now
        Lease(run, take_over=False, say=silent)
    monkeypatch.setattr(leases, "STALE_BEATS", 2)
    time.sleep(2 * BEAT + 1.5)  # S3 tells whole seconds
    said: list[str] = []
    lease = Lease(run, take_over=False, say=said.append)
    assert len(said) == 1
    assert "on far, since 2001" in said[0]
    assert "no sign of life" in said[0]
    lease.release()


def test_a_clock_that_is_wrong_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk; the S3 of the tests lives in this process and has the same clock."""
    run = str(tmp_path / "run")
    with held(run, take_over=False, say=silent):
        real = time.time
        for wrong_s in (3600, -3600):
            monkeypatch.setattr(time, "time", lambda off=wrong_s: real() + off)
            with pytest.raises(RunInUseError):
                Lease(run, take_over=False, say=silent)


def test_a_process_that_was_killed_leaves_no_one_waiting(run: str) -> None:
    code = (
        "import os, sys; sys.path.insert(0, '.')\n"
        "from pipelines.runs.lease import Lease\n"
        f"Lease({run!r}, take_over=False, say=print); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 9
    assert lease_file(f"{run}/{NAME}").read() is not None
    with held(run, take_over=False, say=silent):
        pass


def test_another_attempt_of_the_same_job_goes_on(
    run: str, elsewhere: Callable[..., Holder], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(job="raysubmit_1")
    lost = Lease(run, take_over=False, say=silent)
    elsewhere(job="raysubmit_2", token="b")
    with pytest.raises(RunInUseError, match="job raysubmit_1"):
        Lease(run, take_over=False, say=silent)
    elsewhere(job="raysubmit_1", token="c")
    again = Lease(run, take_over=False, say=silent)
    lost.release()
    again.release()


def test_a_damaged_lease_is_nobodys(run: str) -> None:
    file = lease_file(f"{run}/{NAME}")
    version = file.create(b"{")
    with pytest.raises(TakenError):
        file.create(b"{}")
    with held(run, take_over=False, say=silent) as lease:
        assert json.loads(file.read()[0])["token"] == lease.token
        with pytest.raises(TakenError):
            file.replace(b"{}", version)


def test_heartbeats_outlive_an_outage_of_s3(
    proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BEAT_ENV, str(BEAT))
    run = "s3://leases/outage"
    monkeypatch.setattr(leases, "STALE_BEATS", 1_000)
    with held(run, take_over=False, say=silent) as lease:
        proxy.down()
        time.sleep(5 * BEAT)
        assert check_token(run, "somebody else's") is None  # who cannot know goes on
        proxy.up()
        before = lease_file(f"{run}/{NAME}").read()
        wait_until(lambda: lease_file(f"{run}/{NAME}").read() != before)
        lease.require()


def test_a_server_without_conditional_writes_is_written_to_all_the_same() -> None:
    class Simple:
        """Answers conditions by 501, as some servers do."""

        written = b""

        def split_path(self, path: str) -> tuple[str, str, None]:
            bucket, _, key = path.partition("/")
            return bucket, key, None

        def call_s3(self, method: str, Body: bytes = b"", **arguments: str) -> dict[str, str]:
            if method == "head_object":
                return {"ETag": "1"}
            if arguments.keys() & {"IfMatch", "IfNoneMatch"}:
                answer = {"Error": {"Code": "NotImplemented"}}
                cause = ClientError({**answer, "ResponseMetadata": {"HTTPStatusCode": 501}}, method)
                assert not passes(cause)
                raise OSError("not implemented") from cause
            self.written = Body
            return {"ETag": "1"}

    simple = Simple()
    file = S3LeaseFile(simple, "bucket/run/lease.json", "s3://bucket/run/lease.json")
    assert file.create(b"one") == "1"
    assert file.replace(b"two", "1") == "1"
    assert simple.written == b"two"


def test_where_a_server_passes_over_conditions_the_overwritten_one_notices(
    proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "withheld", frozenset({"if-match", "if-none-match"}))
    uri = f"s3://leases/unconditional/{NAME}"
    mine, theirs = lease_file(uri), lease_file(uri)
    version = mine.create(b"mine")
    version = mine.replace(b"mine, later", version)
    theirs.create(b"theirs")  # both found none when they looked
    with pytest.raises(TakenError):
        mine.replace(b"mine again", version)
    found = mine.read()
    assert found is not None
    assert found[0] == b"theirs"
