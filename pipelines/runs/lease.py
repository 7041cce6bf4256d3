"""The lease on a run's folder: one job writes there at a time.

`lease.json` says who holds it. The holder changes it every `BEAT_S` seconds. A job that finds a
lease that has changed lately is refused; one that has not changed for `STALE_BEATS` beats is taken
over. Ages are differences of two times of the same clock, that of the storage, so it does not
matter whose clock is wrong. On S3 the lease is written on condition that nobody has changed it
(If-None-Match, If-Match); on a disk, under a lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from models.scratch import host_name, is_alive, machine, start_of
from pipelines.runs.lease_file import TakenError, lease_file

NAME = "lease.json"
BEAT_ENV = "RAYJEPA_LEASE_BEAT_S"
BEAT_S = 15.0
STALE_BEATS = 8
GONE = f"another job, which has ended since ({NAME} is gone)"
JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"


class RunInUseError(RuntimeError):
    """Another job trains this run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holder:
    """Contents of lease.json."""

    token: str
    """Different for every process that asks for a lease."""
    job: str
    """Ray's submission id; empty outside of a job."""
    host: str
    machine: str
    """Names the boot of a machine and the process namespace, in which `pid` means something."""
    pid: int
    started: int
    """When the process began (`models.scratch.start_of`)."""
    since: str
    beat: int = 0
    """Grows with every heartbeat."""

    @property
    def told(self) -> str:
        """Who that is, for a message."""
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.pid} on {self.host}, since {self.since}"

    def has_ended(self, asking: Holder) -> bool:
        """Whether the process is known to be gone, or to be of the same job as `asking`."""
        if self.job and self.job == asking.job:
            return True
        return self.machine == asking.machine and not is_alive(self.pid, self.started)


def this_process() -> Holder:
    """Returns what a lease of this process says."""
    job = json.loads(os.environ.get(JOB_ENV, "{}")).get("metadata") or {}
    return Holder(
        token=uuid.uuid4().hex,
        job=str(job.get("job_submission_id", "")),
        host=host_name(),
        machine=machine(),
        pid=os.getpid(),
        started=start_of(os.getpid()),
        since=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def beat_s() -> float:
    """Returns the seconds between two heartbeats."""
    return float(os.environ.get(BEAT_ENV, BEAT_S))


def check_token(run_uri: str, token: str) -> str | None:
    """Returns who has taken a lease over from the process with this token; None if nobody has.

    If the storage does not answer, nobody has.
    """
    try:
        found = lease_file(f"{run_uri}/{NAME}", patience_s=0).read()
    except Exception:  # each storage has classes of its own
        return None
    return _taken_by(found, token)


def _taken_by(found: tuple[bytes, str] | None, token: str) -> str | None:
    """Says whose a lease is, given what was read of it; None if it is that of `token`."""
    holder = _parse(found[0]) if found else None
    if holder is None:
        return GONE
    return None if holder.token == token else holder.told


class LeaseWatch:
    """Says who has taken a lease over, for a worker; asks at most once a heartbeat.

    Args:
        run_uri: The run's folder.
        token: `Lease.token` of the worker's job.
    """

    def __init__(self, run_uri: str, token: str) -> None:
        self._run_uri, self._token = run_uri, token
        self._asked = -math.inf

    def __call__(self) -> str | None:
        """Returns who has it; None if nobody has, as far as is known."""
        if time.monotonic() - self._asked < beat_s():
            return None
        self._asked = time.monotonic()
        return check_token(self._run_uri, self._token)


class Lease:
    """A lease that this process holds, with a thread that keeps it.

    Args:
        run_uri: The run's folder.
        take_over: Whether to take it from a job that is alive; that stops at its next heartbeat.
        say: Takes a line for the user.

    Raises:
        RunInUseError: Another job holds it.
    """

    def __init__(self, run_uri: str, *, take_over: bool, say: Callable[[str], None]) -> None:
        self.run_uri, self.me = run_uri, this_process()
        self.taken_from: Holder | None = None
        self._file = lease_file(f"{run_uri}/{NAME}")
        self._version = self._acquire(take_over, say)
        self._lost: str | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    @property
    def token(self) -> str:
        """By which workers tell that the lease is still this job's."""
        return self.me.token

    def _acquire(self, take_over: bool, say: Callable[[str], None]) -> str:
        while True:
            try:
                found = self._file.read()
                if found is None:
                    return self._file.create(_text(self.me))
                holder = _parse(found[0])
                if holder is not None and holder.token == self.token:
                    return found[1]  # our own write, answered too late
                if holder is not None and not self._seen(holder):
                    self._require_free(holder, take_over, say)
                return self._file.replace(_text(self.me), found[1])
            except TakenError:
                continue  # somebody was faster: look who

    def _seen(self, holder: Holder) -> bool:
        """Whether it was decided to take the lease from this one, which has beaten since."""
        return self.taken_from is not None and holder.token == self.taken_from.token

    def _require_free(self, holder: Holder, take_over: bool, say: Callable[[str], None]) -> None:
        self.taken_from = holder
        if holder.has_ended(self.me):
            return
        age = self._file.age_s()
        if age is None or age > STALE_BEATS * beat_s():
            say(f"taking over the run from {holder.told}, which shows no sign of life")
        elif take_over:
            say(f"taking over the run from {holder.told}, which stops at its next heartbeat")
        else:
            raise RunInUseError(
                f"run {self.run_uri} is in use by {holder.told} (heartbeat {age:.0f} s ago).\n"
                "Give this run another --run.name, or wait until that one has ended (or has been "
                f"dead for {STALE_BEATS * beat_s():.0f} s).\n"
                "--run.take-over makes it stop, and goes on from its newest checkpoint."
            )

    def _beat(self) -> None:
        while self._lost is None and not self._done.wait(beat_s()):
            with contextlib.suppress(Exception):  # no answer: others wait for several beats
                self._beat_once()

    def _beat_once(self) -> None:
        self.me = dataclasses.replace(self.me, beat=self.me.beat + 1)
        quick = self._file.without_patience()
        try:
            self._version = quick.replace(_text(self.me), self._version)
        except TakenError:
            found = quick.read()
            self._lost = _taken_by(found, self.token)
            if found is not None:  # if not lost, it is our own write, answered too late
                self._version = found[1]

    def require(self) -> None:
        """Raises RunInUseError if another job has taken the lease over."""
        if self._lost is not None:
            raise RunInUseError(taken_over(self.run_uri, self._lost))

    def release(self) -> None:
        """Ends the heartbeats, and removes the lease unless another job has it."""
        self._done.set()
        self._thread.join()
        if self._lost is None and check_token(self.run_uri, self.token) is None:
            with contextlib.suppress(Exception):  # a lease that stays goes stale by itself
                self._file.without_patience().remove()


def taken_over(run_uri: str, by: str) -> str:
    """Returns the message for a job whose run another one has taken over."""
    return (
        f"run {run_uri} was taken over by {by}; this job has stopped writing.\n"
        "That one goes on from the newest checkpoint. Give this one another --run.name."
    )


def _text(holder: Holder) -> bytes:
    return (json.dumps(dataclasses.asdict(holder), indent=1) + "\n").encode()


def _parse(text: bytes) -> Holder | None:
    """Returns who a lease names; None if it is damaged, and so nobody's."""
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


@contextlib.contextmanager
def held(run_uri: str, *, take_over: bool, say: Callable[[str], None]) -> Iterator[Lease]:
    """Holds the lease on a run for the length of the block.

    After a job that is alive was told to stop, waits until it must have noticed.
    """
    lease = Lease(run_uri, take_over=take_over, say=say)
    try:
        if lease.taken_from is not None and not lease.taken_from.has_ended(lease.me):
            time.sleep(2 * beat_s())
        yield lease
    except Exception:
        lease.require()  # which says more than what became of the run
        raise
    finally:
        lease.release()
