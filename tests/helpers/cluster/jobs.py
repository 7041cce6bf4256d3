"""A job of the rig's cluster: its output as it grows, its steps, its end."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEP = re.compile(r"^step (\d+)/\d+ ", re.MULTILINE)
RESUMED = re.compile(r"^resuming run '\S+' at step (\d+)", re.MULTILINE)
LOOK_S = 0.5
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclasses.dataclass
class Job:
    """A job that was submitted without waiting."""

    name: str
    ray_folder: Path
    """Ray's folder on the head, seen from here: reading a file costs less than asking."""
    get: Callable[[str], Any]

    def log(self) -> str:
        """Returns what the user has seen so far."""
        for path in self.ray_folder.glob(f"session_2*/logs/job-driver-{self.name}.log"):
            return path.read_text(errors="replace")
        return ""

    def status(self) -> str:
        return str(self.get(f"/api/jobs/{self.name}")["status"])

    def newest_step(self) -> int:
        """The step that the job told last, perhaps for the second time; 0 before the first."""
        return int(["0", *STEP.findall(self.log())][-1])

    def last_step(self) -> int:
        """The furthest step that the job told; 0 before the first."""
        return max((int(step) for step in STEP.findall(self.log())), default=0)

    def wait_until(self, done: Callable[[str], bool], within_s: float, what: str) -> float:
        """Waits until the output satisfies a condition; returns the seconds."""
        started = time.monotonic()
        while not done(self.log()):
            waited = time.monotonic() - started
            if waited > within_s or (waited > LOOK_S and self.status() in ENDED):
                end = self.log()[-4000:]
                raise AssertionError(f"{self.name}: not {what} after {waited:.0f} s: {end}")
            time.sleep(LOOK_S)
        return time.monotonic() - started

    def wait_for_step(self, step: int, within_s: float) -> float:
        return self.wait_until(lambda _: self.last_step() >= step, within_s, f"at step {step}")

    def wait_for_end(self, within_s: float) -> str:
        """Returns how it ended."""
        deadline = time.monotonic() + within_s
        while (status := self.status()) not in ENDED:
            assert time.monotonic() < deadline, self.log()[-4000:]
            time.sleep(LOOK_S)
        return status
