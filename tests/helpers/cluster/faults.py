"""What a fault does to a job that trains: seconds, repeated steps, lines that the user sees."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from helpers.cluster.jobs import RESUMED, STEP, Job
from helpers.cluster.report import Row, record, told_in

RESTART_S = 240
LOG_EVERY = 2
"""Steps from one line of a run to the next."""


class Watch:
    """Begins when a fault is about to be injected."""

    def __init__(self, job: Job, number: str, fault: str, test: str) -> None:
        self.job, self.number, self.fault, self.test = job, number, fault, test
        self.step = job.newest_step()
        self.at = len(job.log())
        """Where in the job's output the fault begins."""
        self._started = time.monotonic()
        self._seconds: float | None = None

    def new(self) -> str:
        """What the job has printed since."""
        return self.job.log()[self.at :]

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def steps(self) -> list[int]:
        return [self.step, *map(int, STEP.findall(self.new()))]

    def restarted(self, within_s: float) -> int:
        """Waits until the run takes steps again that it had taken; returns how many."""

        def has(_: str) -> bool:
            resumed = RESUMED.search(self.new())
            after = resumed and STEP.search(self.new(), resumed.end())
            return bool(after or _repeated(self.steps()))

        self.job.wait_until(has, within_s, "restarted")
        self._seconds = self.seconds()
        return _repeated(self.steps())

    def went_on(self, within_s: float, readings: int = 3) -> None:
        """Waits for some more steps, which the run must reach without a restart."""
        self.job.wait_for_step(self.job.last_step() + readings, within_s)
        assert not _repeated(self.steps()), self.new()

    def settled(self, within_s: float) -> int:
        """Waits for more steps, with or without a restart; returns the steps that are repeated."""
        self.job.wait_for_step(self.job.last_step() + 3, within_s)
        return _repeated(self.steps())

    def record(self, happened: str, lost: str) -> None:
        record(
            Row(
                number=self.number,
                fault=self.fault,
                happened=happened,
                lost=lost,
                recovery_s=self._seconds,
                message=told_in(self.new()),
                test=self.test,
            )
        )


def _repeated(steps: list[int]) -> int:
    """Returns how many steps were taken again, given those that a job told in order."""
    for before, step in itertools.pairwise(steps):
        if step <= before:
            return before - step + LOG_EVERY
    return 0


Begin = Callable[[str, str], Watch]
"""Begins to watch, given the number and the name of a fault."""
