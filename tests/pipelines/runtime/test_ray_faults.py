"""What happens to Ray is told in three lines, whatever the command and whoever wraps the error."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import ray.exceptions
from ray.exceptions import (
    ActorDiedError,
    AuthenticationError,
    GetTimeoutError,
    NodeDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    RpcError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal import exceptions as train_exceptions
from ray.train.v2._internal.exceptions import (
    CheckpointManagerInitializationError,
    InsufficientClusterResourcesError,
    RayTrainError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from pipelines.runtime.errors import explain, run_command
from pipelines.runtime.faults import Fault
from pipelines.runtime.ray_faults import AGAIN, MOST_CHARACTERS, explain_ray

GLOO = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
    "[192.0.2.12]:40111"
)
DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
\tactor_id: 6a1c5ad7e7ce6cd5b7d3b2a801000000
\tpid: 4711
\tip: 192.0.2.12
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit \
detail: Worker unexpectedly exits with a connection error code 2. End of file. There are some \
potential root causes. (1) The process is killed by SIGKILL by OOM killer."""
VERSIONS = """Version mismatch: The cluster was started with:
    Ray: 2.60.0
    Python: 3.11.2
This process on node 192.0.2.2 was started with:
    Ray: 2.59.0
    Python: 3.12.1
"""


def died() -> ActorDiedError:
    error = ActorDiedError()
    error.error_msg = DIED
    return error


def lines(error: BaseException) -> list[str]:
    told = explain(error, [])
    assert told is not None
    return told.splitlines()


@pytest.mark.parametrize(
    ("error", "first"),
    [
        (ControllerError(died()), "a process of the job was lost on 192.0.2.12"),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), "the workers did not start in time"),
        (
            ControllerError(WorkerGroupStartupFailedError("a worker died")),
            "the workers could not be started",
        ),
        (NodeDiedError("The node is unreachable."), "a machine was lost, or Ray on it"),
        (GetTimeoutError("Get timed out"), "Ray did not answer in time"),
        (WorkerCrashedError(), "a process of the job was lost"),
        (RpcError("unavailable"), "the head of the Ray cluster does not answer"),
        (
            RayTaskError("f", "Traceback ...\nray.exceptions.OwnerDiedError: gone", None),
            "data of the job was lost with a process or a machine",
        ),
    ],
)
def test_a_loss_is_told_with_its_reason_and_the_way_on(error: Exception, first: str) -> None:
    told = lines(error)
    assert told[0] == first
    assert told[1].startswith("(")
    assert len(told[1]) <= MOST_CHARACTERS + 2
    assert told[2].startswith(AGAIN)


@pytest.mark.parametrize(
    ("error", "what", "way_out"),
    [
        (AuthenticationError("No token"), "refuses the token", "RAY_AUTH_TOKEN"),
        (OutOfMemoryError("Task was killed.\nMemory ..."), "out of memory", "fewer workers"),
        (OutOfDiskError("put"), "no space left", "--object-spilling-directory"),
        (ObjectStoreFullError("put"), "object store of a machine is full", "--object-store-memory"),
        (RuntimeEnvSetupError("no space"), "could not prepare", "working directory"),
        (RuntimeError(VERSIONS), "runs Ray 2.60.0, Python 3.11.2, and this", "Install the same"),
        (
            ControllerError(CheckpointManagerInitializationError("not JSON")),
            "list of the run's checkpoints is damaged",
            "mends the list",
        ),
        (
            ControllerError(InsufficientClusterResourcesError("needs 8 GPUs")),
            "cannot become large enough",
            "Lower --run.workers",
        ),
    ],
)
def test_what_is_full_or_refused_is_told_with_a_way_out(
    error: Exception, what: str, way_out: str
) -> None:
    told = lines(error)
    assert what in told[0]
    assert way_out in " ".join(told)
    assert len(told) <= 3


def classes(module: Any, base: type) -> list[type]:
    found = [one for _, one in inspect.getmembers(module, inspect.isclass) if issubclass(one, base)]
    assert len(found) > 5
    return found


@pytest.mark.parametrize(
    "cls", [*classes(ray.exceptions, RayError), *classes(train_exceptions, RayTrainError)]
)
def test_no_error_of_ray_is_left_out(cls: type) -> None:
    bases = frozenset(base.__name__ for base in cls.__mro__)
    fault = Fault(name=cls.__name__, module="ray", bases=bases, text="of 192.0.2.1\nmore words")
    if not fault.is_a("OutOfMemoryError"):  # told with torch's
        told = explain_ray(fault)
        assert told is not None
        assert len(told.splitlines()) <= 3


def test_the_process_that_was_lost_is_told_and_not_those_that_waited_for_it() -> None:
    lost = WorkerHealthCheckFailedError("A worker health check failed.", died())
    told = lines(WorkerGroupError("words", {0: GLOO, 1: lost, 2: GLOO}))
    assert told[0] == "a process of the job was lost on 192.0.2.12"
    assert "its worker process has died" in told[1]
    assert "root causes" not in told[1]


def test_workers_that_lost_touch_are_told_and_what_they_met_before_is_told_instead() -> None:
    assert lines(WorkerGroupError("words", {0: GLOO, 1: GLOO}))[0].startswith("workers lost touch")
    full = OSError(28, "No space left on device")
    assert lines(WorkerGroupError("words", {0: GLOO, 1: full}))[0].startswith("no space left")


@pytest.mark.parametrize(
    "error",
    [
        WorkerGroupError("words", {0: GLOO, 1: KeyError("x")}),
        RuntimeError("shapes (3,) and (4,) differ"),
        ActorDiedError(RayTaskError("f", "Traceback ...\nKeyError: 'a'", KeyError("a"))),
    ],
)
def test_a_fault_of_ours_is_not_taken_for_a_loss(error: Exception) -> None:
    assert explain(error, []) is None


def test_every_command_ends_with_it() -> None:
    def job(_: object) -> None:
        raise ControllerError(died())

    with pytest.raises(SystemExit) as ended:
        run_command(lambda: None, job, configs=lambda _: ())
    told = str(ended.value.code).splitlines()
    assert told[0] == "error: a process of the job was lost on 192.0.2.12"
    assert len(told) == 3
