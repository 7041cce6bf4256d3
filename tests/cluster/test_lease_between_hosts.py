"""The lease on a run, and patience with S3, between hosts that are cut off or lose power.

Ray is not needed for that: a process on each of two hosts asks for the lease of one run.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from helpers.cluster import network
from helpers.cluster.hosts import CODE
from helpers.cluster.report import record_job
from helpers.cluster.rig import Rig
from helpers.cluster.s3 import BUCKET

pytestmark = pytest.mark.slow

BEAT_S = 1.5
STALE_S = 8 * BEAT_S
WITHIN_S = 30.0
HOLD = """
import sys, time
from pipelines.runs.lease import RunInUseError, held
try:
    with held(sys.argv[1], take_over=False, say=lambda line: print(line, flush=True)) as lease:
        print("holds", flush=True)
        while True:
            lease.require()
            time.sleep(0.1)
except RunInUseError as error:
    print(error, flush=True)
"""
READ = """
import hashlib, sys
from pipelines.runtime.uris import open_uri
for number in range(30):
    fs, path = open_uri(sys.argv[1])
    print(hashlib.sha256(fs.cat_file(path)).hexdigest(), flush=True)
"""


class Asker:
    """A process on a host that asks for the lease of a run, and holds it as long as it may."""

    def __init__(self, rig: Rig, host: str, run: str) -> None:
        env = rig.s3.env | {"PYTHONPATH": CODE, "RAYJEPA_LEASE_BEAT_S": str(BEAT_S)}
        self.process = rig[host].start("python", "-c", HOLD, f"s3://{BUCKET}/{run}", env=env)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def says(self, text: str) -> float:
        """Waits for a line with this text; returns the seconds."""
        started = time.monotonic()
        while not any(text in line for line in self.lines):
            assert time.monotonic() - started < WITHIN_S, self.lines
            time.sleep(0.05)
        return time.monotonic() - started

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def installed(rig: Rig) -> Rig:
    """The rig with our code on both workers."""
    for name in ("w1", "w2"):
        rig[name].install("models", "pipelines")
    return rig


Ask = Callable[[str, str], Asker]


@pytest.fixture
def ask(installed: Rig) -> Iterator[Ask]:
    """Makes a host ask for the lease of a run; whoever has asked is ended with the test."""
    made: list[Asker] = []

    def begin(host: str, run: str) -> Asker:
        made.append(Asker(installed, host, run))
        return made[-1]

    yield begin
    for one in made:
        one.end()


def holder(rig: Rig, run: str) -> str:
    """The host that a run's lease names."""
    return str(json.loads(rig.s3.files().cat_file(f"{BUCKET}/{run}/lease.json"))["host"])


def test_a_second_host_is_refused(installed: Rig, ask: Ask) -> None:
    ask("w1", "refused").says("holds")
    second = ask("w2", "refused")
    second.says("is in use by")
    assert "on w1" in second.lines[0]
    assert holder(installed, "refused") == "w1"


def test_a_host_that_is_cut_off_shortly_keeps_its_run(installed: Rig, ask: Ask) -> None:
    first = ask("w1", "kept")
    first.says("holds")
    with network.cut("w1"):
        time.sleep(STALE_S / 4)
        second = ask("w2", "kept")
        second.says("is in use by")
    time.sleep(STALE_S)
    assert first.lines == ["holds"]
    assert holder(installed, "kept") == "w1"


def test_a_host_that_is_cut_off_for_long_stops_when_it_is_back(installed: Rig, ask: Ask) -> None:
    """Never do two hosts write: the one that was cut off finds the other's lease."""
    first = ask("w1", "lost")
    first.says("holds")
    with network.cut("w1"):
        time.sleep(STALE_S + BEAT_S)
        second = ask("w2", "lost")
        second.says("shows no sign of life")
        second.says("holds")
    seconds = first.says("was taken over by")
    assert second.lines[-1] == "holds"
    assert holder(installed, "lost") == "w2"
    record_job(
        "own 8",
        f"the holder's host is cut off for longer than a lease lasts ({STALE_S:g} s here)",
        "another host takes the run over; the first one stops when its network is back",
        "nothing",
        seconds,
        "WARNING: " + next(line for line in first.lines if "taken over" in line),
        "test_a_host_that_is_cut_off_for_long_stops_when_it_is_back",
    )


def test_a_host_that_loses_power_holds_a_run_no_longer_than_its_heartbeats(
    installed: Rig, ask: Ask
) -> None:
    ask("w1", "dark").says("holds")
    installed["w1"].power_off()
    try:
        ask("w2", "dark").says("is in use by")
        time.sleep(STALE_S + BEAT_S)
        again = ask("w2", "dark")
        again.says("shows no sign of life")
        again.says("holds")
    finally:
        installed["w1"].power_on()


def test_a_clock_that_is_wrong_does_not_matter(installed: Rig, ask: Ask) -> None:
    """A lease from a host whose clock is a year ahead: the storage's own clock tells its age."""
    first = ask("w1", "clock")
    first.says("holds")
    files, path = installed.s3.files(), f"{BUCKET}/clock/lease.json"
    lease = json.loads(files.cat_file(path))
    first.end()
    year = int(lease["since"][:4]) + 1
    lease |= {"since": f"{year}{lease['since'][4:]}", "host": "ahead", "machine": "of its own"}
    files.pipe_file(path, json.dumps(lease).encode())
    ask("w2", "clock").says("is in use by")
    time.sleep(STALE_S + BEAT_S)
    ask("w2", "clock").says("holds")


@pytest.mark.parametrize("cut_s", [5, 20])
def test_reads_outlast_a_cable(installed: Rig, cut_s: int) -> None:
    data = bytes(range(256)) * 4096
    installed.s3.files().pipe_file(f"{BUCKET}/object", data)
    env = installed.s3.env | {"PYTHONPATH": CODE}
    reader = installed["w1"].start("python", "-c", READ, f"s3://{BUCKET}/object", env=env)
    assert reader.stdout is not None
    first = reader.stdout.readline()
    with network.cut("w1"):
        time.sleep(cut_s)
    rest, _ = reader.communicate(timeout=WITHIN_S + cut_s)
    seen = [line for line in [first, *rest.splitlines(keepends=True)] if "WARNING" not in line]
    assert reader.returncode == 0, rest
    assert seen == [hashlib.sha256(data).hexdigest() + "\n"] * 30
