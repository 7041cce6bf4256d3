"""Decides after a failure whether a run's workers start again, and says in one line what happened.

`--run.max-failures` counts what a run suffers. Not counted are: a group that stopped because it was
asked to, a host that was taken away with notice, and a host that fails again in the same way by
itself (a full disk, a dead GPU), which is left out for a time that grows instead.
"""

from __future__ import annotations

import errno
import re
import textwrap
from collections.abc import Callable
from typing import Any

from ray.train import ControllerError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure
from ray.train.v2.api.exceptions import PreemptionError, TrainingFailedError, WorkerGroupError

from pipelines.runtime.faults import Fault, faults_of
from pipelines.runtime.worker_failures import failure_line
from pipelines.worker_group.group import Host, this_group

FULL = (errno.ENOSPC, errno.EDQUOT)
BROKEN = (errno.EROFS, errno.EIO)
FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded", re.I)
GPU_TEXT = re.compile(
    r"uncorrectable ECC|no CUDA-capable device|CUDA-capable device\(s\) is/are busy|GPU is lost"
    r"|fallen off the bus|No CUDA GPUs are available|CUDA unknown error|driver initialization",
    re.I,
)
"""What a GPU says that does not work, as far as it is not a program's own mistake."""


class Failures(DefaultFailurePolicy):
    """Ray Train's failure policy, with what is not counted and with lines for the user.

    Args:
        failure_config: Ray's.
        say: Takes a line. Must survive pickling.
    """

    def __init__(self, failure_config: Any, say: Callable[[str], None]) -> None:
        super().__init__(failure_config)
        self._say = say

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Called by Ray Train's controller with what ended a group, or its start."""
        error, group = training_failed_error, this_group()
        if isinstance(error, WorkerGroupError) and was_stopped(error):
            return FailureDecision.RETRY
        found = host_fault(error, group.hosts)
        seen = found is not None and (found[0].address, found[1]) in group.faults
        decision = FailureDecision.RETRY if seen else super().make_decision(error)
        if isinstance(error, ControllerError):
            self._tell_start(error.controller_failure)
            return decision
        parts = [self._what(error), self._count(error, seen=seen)]
        if found is not None:
            host, kind = found
            parts.append(f"{host} is left out for {group.leave_out(host, kind):.0f} s")
        if decision is FailureDecision.RETRY:
            parts.append(f"going on from {group.since()}")
        self._say("; ".join(parts))
        return decision

    def _tell_start(self, error: Exception) -> None:
        """Reacts to a group that did not start, which Ray tries again without counting."""
        if isinstance(error, WorkerGroupStartupTimeoutError):  # that it waits is told elsewhere
            this_group().refuse(error.num_workers)
        elif isinstance(error, WorkerGroupStartupFailedError):
            reason = textwrap.shorten(str(error.__cause__ or error), 160)
            self._say(f"WARNING: workers did not start ({reason}); starting them again")

    def _what(self, error: TrainingFailedError) -> str:
        group = this_group()
        if isinstance(error, WorkerGroupError):
            failures = error.worker_failures
            return failure_line({**failures, **group.lost(failures)}, group.hosts)
        ranks = error.preemption_info.preempted_ranks if isinstance(error, PreemptionError) else []
        gone = {str(group.hosts[rank]) for rank in ranks if rank in group.hosts}
        return f"WARNING: host {', '.join(sorted(gone)) or 'of a worker'} was taken away"

    def _count(self, error: TrainingFailedError, *, seen: bool) -> str:
        if seen:
            return "not counted again"
        if _is_preemption_failure(error):
            return "not counted as a failure"
        most = self.failure_config.max_failures
        return f"failure {self._worker_group_failures}" + (f" of {most}" if most >= 0 else "")


def was_stopped(error: WorkerGroupError) -> bool:
    """Whether workers ended because they were asked to."""
    return any(
        fault.name == "GroupStoppedError"
        for failure in error.worker_failures.values()
        for fault in faults_of(failure)
    )


def host_fault(error: TrainingFailedError, hosts: dict[int, Host]) -> tuple[Host, str] | None:
    """Returns the host that failed by itself, and the kind of its fault; None for other failures.

    Args:
        error: What ended a group.
        hosts: By rank.
    """
    if not isinstance(error, WorkerGroupError):
        return None
    for rank, failure in sorted(error.worker_failures.items()):
        kinds = (_kind(fault) for fault in faults_of(failure))
        kind = next((kind for kind in kinds if kind), None)
        if kind and rank in hosts:
            return hosts[rank], kind
    return None


def _kind(fault: Fault) -> str | None:
    if fault.number in FULL or FULL_TEXT.search(fault.text):
        return "full disk"
    if fault.number in BROKEN:
        return "broken disk"
    return "broken GPU" if GPU_TEXT.search(fault.text) else None
