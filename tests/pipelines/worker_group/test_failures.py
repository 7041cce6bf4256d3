"""What counts as a failure of a run, and the line that tells it."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from pipelines.worker_group.failures import Failures
from pipelines.worker_group.group import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    REFUSED_S,
    Group,
    Host,
    selector,
    size_line,
    this_group,
)
from pipelines.worker_group.stopping import GroupStoppedError

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


@pytest.fixture
def group() -> Iterator[Group]:
    """The group of this process: two hosts, and a checkpoint of step 40."""
    this_group.cache_clear()
    found = this_group()
    found.hosts = {0: Host(node="aa", address="10.0.0.1"), 1: Host(node="bb", address="10.0.0.2")}
    found.step = 40
    yield found
    this_group.cache_clear()


def policy(most: int) -> tuple[Failures, list[str]]:
    lines: list[str] = []
    return Failures(FailureConfig(max_failures=most), lines.append), lines


def failed(**failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("", {int(rank[1:]): error for rank, error in failures.items()})


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "/tmp/rayjepa-checkpoint")


def lost(*, preempted: bool = False) -> Exception:
    error = ActorDiedError()
    error._preempted = preempted
    return WorkerHealthCheckFailedError("A worker health check failed.", error)


def test_failures_are_counted_and_told_with_the_host(group: Group) -> None:
    failures, lines = policy(2)
    decisions = [failures.make_decision(failed(r1=lost())) for _ in range(3)]
    assert decisions == [RETRY, RETRY, RAISE]
    assert lines[0].startswith("WARNING: worker 1 on 10.0.0.2 was lost (ActorDiedError: ")
    assert lines[0].endswith("; failure 1 of 2; going on from step 40")
    assert "failure 2 of 2" in lines[1]
    assert lines[2].endswith("failure 3 of 2")


def test_a_host_that_does_not_answer_is_named_before_those_that_miss_it(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker 0 has met a broken connection; 1 is silent, 2 has died, 3 answers."""
    group.hosts |= {rank: Host(node="cc", address="10.0.0.3") for rank in (2, 3)}
    answers = {"silent": None, "dead": ActorDiedError(), "alive": "here"}
    names = {1: "silent", 2: "dead", 3: "alive"}
    group.actors = {
        rank: SimpleNamespace(get_metadata=SimpleNamespace(remote=lambda name=name: name))
        for rank, name in {0: "not asked", **names}.items()
    }

    def get(name: str) -> str:
        answer = answers[name]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(
        ray, "wait", lambda refs, **_: ([r for r in refs if answers[r]], ["silent"])
    )
    failures, lines = policy(3)
    assert failures.make_decision(failed(r0=RuntimeError("connection reset"))) is RETRY
    assert lines[0].startswith(
        "WARNING: worker 1 on 10.0.0.2 was lost (RayActorError: it does not answer); "
        "worker 2 on 10.0.0.3 was lost (ActorDiedError: "
    )
    assert "; 1 more failed; failure 1 of 3" in lines[0]
    assert group.avoided() == {"bb"}


def test_without_a_limit_the_count_alone_is_told(group: Group) -> None:
    failures, lines = policy(-1)
    assert failures.make_decision(failed(r0=ValueError("x"))) is RETRY
    assert "; failure 1; " in lines[0]


def test_a_group_that_was_asked_to_stop_has_not_failed(group: Group) -> None:
    failures, lines = policy(0)
    stopped = failed(r0=GroupStoppedError("room"), r1=RuntimeError("connection reset"))
    assert failures.make_decision(stopped) is RETRY
    assert lines == []
    assert failures.make_decision(failed(r1=RuntimeError("connection reset"))) is RAISE


def test_a_host_that_is_taken_away_is_not_counted(group: Group) -> None:
    failures, lines = policy(0)
    told = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"bb": [1]})
    assert failures.make_decision(PreemptionError(told)) is RETRY
    assert failures.make_decision(failed(r1=lost(preempted=True))) is RETRY
    assert lines[0].startswith("WARNING: host 10.0.0.2 was taken away; not counted as a failure")
    assert "not counted as a failure" in lines[1]


def test_a_full_disk_counts_once_and_leaves_its_host_out_for_longer_each_time(group: Group) -> None:
    failures, lines = policy(1)
    for _ in range(8):
        assert failures.make_decision(failed(r1=full(), r0=RuntimeError("reset"))) is RETRY
    assert "failure 1 of 1; 10.0.0.2 is left out for 30 s; going on from step 40" in lines[0]
    assert all("not counted again" in line for line in lines[1:])
    pauses = [float(line.split("left out for ")[1].split(" s")[0]) for line in lines]
    assert pauses == [min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**n) for n in range(8)]
    assert group.avoided() == {"bb"}
    # A failure of another kind, or of another host, counts.
    assert failures.make_decision(failed(r0=full())) is RAISE


def test_a_pause_ends(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    group.leave_out(group.hosts[1], "full disk")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + FIRST_PAUSE_S + 1)
    assert group.avoided() == frozenset()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        OSError(errno.EROFS, "Read-only file system"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("No CUDA GPUs are available"),
    ],
)
def test_faults_of_a_host(group: Group, error: Exception) -> None:
    failures, _ = policy(1)
    assert [failures.make_decision(failed(r1=error)) for _ in range(4)] == [RETRY] * 4


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert triggered"), OSError(errno.ENOENT, "x")],
)
def test_faults_of_a_program_are_counted(group: Group, error: Exception) -> None:
    failures, _ = policy(1)
    assert [failures.make_decision(failed(r1=error)) for _ in range(2)] == [RETRY, RAISE]


def test_waiting_for_a_place_is_no_failure_and_told_elsewhere(group: Group) -> None:
    failures, lines = policy(0)
    error = ControllerError(WorkerGroupStartupTimeoutError(num_workers=2))
    assert failures.make_decision(error) is RETRY
    assert lines == []


def test_workers_that_do_not_start_are_told_each_time(group: Group) -> None:
    failures, lines = policy(0)
    error = ControllerError(WorkerGroupStartupFailedError("a worker failed to initialize"))
    assert [failures.make_decision(error) for _ in range(2)] == [RETRY, RETRY]
    told = "WARNING: workers did not start (a worker failed to initialize); starting them again"
    assert lines == [told] * 2


def test_a_size_without_a_place_is_not_tried_again_at_once(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks, which are not counted, may hold what should be free; a smaller group fits."""
    failures, _ = policy(0)
    assert group.worth_trying((2, 4, 8)) == (2, 4, 8)
    failures.make_decision(ControllerError(WorkerGroupStartupTimeoutError(num_workers=8)))
    assert group.worth_trying((2, 4, 8)) == (2, 4)
    failures.make_decision(ControllerError(WorkerGroupStartupTimeoutError(num_workers=2)))
    assert group.worth_trying((2, 4, 8)) == (2, 4, 8)  # there is no smaller one
    now = time.monotonic()
    group.refuse(4)
    monkeypatch.setattr(time, "monotonic", lambda: now + REFUSED_S + 1)
    assert group.worth_trying((2, 4, 8)) == (2, 4, 8)


def test_the_line_of_a_size_and_rays_selector() -> None:
    hosts = {rank: Host(node="n", address=f"10.0.0.{rank // 2}") for rank in range(4)}
    told = size_line(hosts, 2, 8)
    assert told == (
        "training with 4 of at most 8 workers instead of 2 (2 on 10.0.0.0, 2 on 10.0.0.1)"
    )
    assert selector({"b", "a"}) == {"ray.io/node-id": "!in(a,b)"}
    assert selector(()) is None
