"""Tells the driver which worker failed and why; Ray Train itself restarts the workers silently."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from ray.exceptions import RayActorError
from ray.train import ControllerError, UserCallback

from pipelines.runtime.faults import faults_of

MOST_WORKERS = 2
"""Workers named in one line: when one is lost, those that waited for it fail as well."""
MOST_CHARACTERS = 240
"""Length at which the reason of one worker is cut off."""


LOST_IN_START = "WARNING: a worker was lost while the workers started; starting them again"


def failures_left(error: ControllerError, max_failures: int) -> int | None:
    """Says whether Ray Train gave up only because a worker was lost in the last part of a start.

    In that part Ray Train 2.60 waits for the workers without counting a lost one as a failure, and
    ends the run.

    Args:
        error: what ended it.
        max_failures: how many failures the run may still have; -1 for no limit.

    Returns:
        How many it may have after this one; None if it ends here.
    """
    if not isinstance(error.controller_failure, RayActorError) or max_failures == 0:
        return None
    return max_failures - 1 if max_failures > 0 else max_failures


class FailureReporter(UserCallback):
    """A Ray Train callback that says one line whenever workers fail, before they are restarted.

    Args:
        say: Takes the line. It must survive pickling: callbacks run in Ray Train's controller.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def after_exception(
        self, run_context: Any, worker_exceptions: Mapping[int, BaseException]
    ) -> None:
        """Called by Ray Train with the exceptions of the failed workers by rank."""
        self._say(failure_line(worker_exceptions))


def failure_line(worker_exceptions: Mapping[int, BaseException]) -> str:
    """One line naming each failed worker, the class of its error and what the error says.

    Lost processes come first, because other workers usually fail as a consequence.
    """
    failures = {
        # Ray Train wraps the error of a worker that no longer answers.
        rank: getattr(error, "health_check_failure", error)
        for rank, error in worker_exceptions.items()
    }
    ranks = sorted(failures, key=lambda rank: (not isinstance(failures[rank], RayActorError), rank))
    told = [f"worker {rank} failed ({_reason(failures[rank])})" for rank in ranks[:MOST_WORKERS]]
    hidden = len(ranks) - len(told)
    return "WARNING: " + "; ".join(told + ([f"{hidden} more failed"] if hidden else []))


def _reason(error: BaseException) -> str:
    if isinstance(error, RayActorError):
        # Lines that begin with a tab identify the process; the others say why it is gone.
        lines = [line for line in str(error).splitlines() if not line.startswith("\t")]
        return _shorten(type(error).__name__, " ".join(lines))
    fault = next(faults_of(error), None)
    name, text = (fault.name, fault.text) if fault else (type(error).__name__, str(error))
    return _shorten(name, *text.strip().splitlines()[:1])


def _shorten(*parts: str) -> str:
    return textwrap.shorten(": ".join(parts), MOST_CHARACTERS)
