"""Says which worker failed and why; Ray Train itself restarts the workers silently."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from ray.exceptions import RayActorError
from ray.train import ControllerError

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


def failure_line(
    worker_exceptions: Mapping[int, BaseException], hosts: Mapping[int, object] | None = None
) -> str:
    """One line naming each failed worker, its host, the class of its error and what that says.

    Lost processes come first, because other workers usually fail as a consequence.

    Args:
        worker_exceptions: By rank.
        hosts: The addresses of the workers' hosts by rank, as far as they are known.
    """
    where = {rank: f" on {host}" for rank, host in (hosts or {}).items()}
    failures = {
        # Ray Train wraps the error of a worker that no longer answers.
        rank: getattr(error, "health_check_failure", error)
        for rank, error in worker_exceptions.items()
    }
    ranks = sorted(failures, key=lambda rank: (not isinstance(failures[rank], RayActorError), rank))
    told = [
        f"worker {rank}{where.get(rank, '')} {_verb(failures[rank])} ({_reason(failures[rank])})"
        for rank in ranks[:MOST_WORKERS]
    ]
    hidden = len(ranks) - len(told)
    return "WARNING: " + "; ".join(told + ([f"{hidden} more failed"] if hidden else []))


def _verb(error: BaseException) -> str:
    return "was lost" if isinstance(error, RayActorError) else "failed"


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
