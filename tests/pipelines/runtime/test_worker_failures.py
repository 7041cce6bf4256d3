"""The line that says which worker failed and why."""

from __future__ import annotations

from ray.exceptions import ActorDiedError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pipelines.runtime.worker_failures import failure_line


def test_the_line_has_the_class_and_the_first_line_of_the_error():
    error = ValueError("bad batch\nwith details")
    assert failure_line({3: error}) == "WARNING: worker 3 failed (ValueError: bad batch)"


def test_a_lost_process_comes_before_the_errors_that_follow_from_it():
    lost = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
    failures = {0: RuntimeError("connection reset"), 1: lost, 2: RuntimeError("connection reset")}
    first, second, more = failure_line(failures).split("; ")
    assert first.startswith("WARNING: worker 1 was lost (ActorDiedError: The actor died")
    assert second == "worker 0 failed (RuntimeError: connection reset)"
    assert more == "1 more failed"


def test_wrappers_of_ray_are_taken_off():
    cause = OSError(28, "No space left on device")
    wrapped = RayTaskError("train", "Traceback ...\nOSError: No space left", cause)
    assert "OSError" in failure_line({0: wrapped.as_instanceof_cause()})


def test_the_host_is_named_where_it_is_known():
    told = failure_line({0: ValueError("x"), 1: ValueError("y")}, {1: "10.0.0.7"})
    assert told == (
        "WARNING: worker 0 failed (ValueError: x); worker 1 on 10.0.0.7 failed (ValueError: y)"
    )
