"""Plays episodes: rows on starts and goals, in parts, side by side, and no part twice."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from pipelines.planning.episodes import Episodes, Tasks, run_episodes
from pipelines.planning.journal import Journal, key_of
from pipelines.planning.rows import WORLD, Comparison, Row


@dataclass(frozen=True, kw_only=True)
class Job:
    """Episodes of one row."""

    row: Row
    tasks: Tasks
    name: str
    """What is played, as progress and journal name it; rows that differ need names that do."""
    budget: int | None = None
    """Imagined steps that one action may cost; None for that of the parts."""


def run_job(parts: Comparison, job: Job) -> tuple[Episodes, float]:
    """Runs the episodes of a job; returns them and the seconds of CPU time that they took."""
    torch.set_num_threads(1)
    if job.budget is not None:
        task = dataclasses.replace(parts.task, budget=job.budget)
        parts = dataclasses.replace(parts, task=task)
    start = time.thread_time()  # others on the machine should not count
    found = run_episodes(WORLD, job.row.policy(parts, job.tasks), job.tasks, parts.task.steps)
    return found, time.thread_time() - start


Played = list[tuple[Episodes, float]]
"""Episodes and seconds of each job."""
Each = Callable[
    [Comparison, Callable[[Comparison, Any], Any], Sequence[Any]], Iterable[tuple[int, Any]]
]
"""Does some work with the parts for every item; yields the numbers of the items and what was found,
as they end."""


def in_tasks(
    parts: Comparison, work: Callable[[Comparison, Any], Any], items: Sequence[Any]
) -> Iterator[tuple[int, Any]]:
    """An `Each` that uses one Ray task for every item."""
    if not items:
        return
    import ray

    from pipelines.runtime.cluster import start_ray

    start_ray()
    shared, remote = ray.put(parts), ray.remote(num_cpus=1)(work)
    running = {remote.remote(shared, item): number for number, item in enumerate(items)}
    while running:
        (ended,), _ = ray.wait(list(running), num_returns=1)
        yield running.pop(ended), ray.get(ended)


def in_order(found: Iterable[tuple[int, Any]]) -> list[Any]:
    """Returns what an `Each` yields in the order of the items."""
    return [one for _, one in sorted(found, key=itemgetter(0))]


def chunked(tasks: Tasks, chunk: int) -> list[Tasks]:
    """Divides tasks into parts of at most `chunk` episodes."""
    return [tasks.part(slice(first, first + chunk)) for first in range(0, len(tasks), chunk)]


@dataclass(frozen=True, kw_only=True)
class Player:
    """Plays jobs in parts."""

    chunk: int
    """Episodes of a part, which one task runs."""
    each: Each
    """Runs the parts, such as `in_tasks`."""
    journal: Journal | None = None
    """Keeps what was played; what it holds is not played again. None keeps nothing."""
    tell: Callable[[str], None] = lambda line: None
    """Is told how far it is."""

    def play(self, parts: Comparison, jobs: Sequence[Job]) -> Played:
        """Plays jobs; returns what `run_job` does of each."""
        divided = [
            (number, dataclasses.replace(job, tasks=tasks))
            for number, job in enumerate(jobs)
            for tasks in chunked(job.tasks, self.chunk)
        ]
        found: dict[int, list[tuple[int, tuple[Episodes, float]]]] = {
            n: [] for n in range(len(jobs))
        }
        left, ended = Counter(number for number, _ in divided), 0
        for place, result in self._parts(parts, [part for _, part in divided]):
            number = divided[place][0]
            found[number].append((place, result))
            left[number] -= 1
            if not left[number]:
                ended += 1
                self._told(jobs[number], _joined(in_order(found[number])), f"{ended}/{len(jobs)}")
        return [_joined(in_order(found[number])) for number in range(len(jobs))]

    def _parts(
        self, parts: Comparison, jobs: Sequence[Job]
    ) -> Iterator[tuple[int, tuple[Episodes, float]]]:
        """Yields numbers and results of jobs as they end, at first those of the journal."""
        if self.journal is None:
            yield from self.each(parts, run_job, jobs)
            return
        made = key_of(parts)
        keys = [key_of(made, job.name, job.budget, job.tasks) for job in jobs]
        known = {number: self.journal.read(key) for number, key in enumerate(keys)}
        yield from ((number, result) for number, result in known.items() if result is not None)
        new = [number for number, result in known.items() if result is None]
        for place, result in self.each(parts, run_job, [jobs[number] for number in new]):
            self.journal.write(keys[new[place]], *result)
            yield new[place], result

    def _told(self, job: Job, played: tuple[Episodes, float], share: str) -> None:
        episodes, seconds = played
        succeeded_B = episodes.succeeded_B
        self.tell(
            f"[{share}] {job.name}: {float(succeeded_B.float().mean()):.0%} of "
            f"{len(succeeded_B)} episodes, {seconds:.0f} s"
        )


def _joined(found: Played) -> tuple[Episodes, float]:
    names = [field.name for field in dataclasses.fields(Episodes)]
    columns: dict[str, Tensor] = {
        name: torch.cat([getattr(episodes, name) for episodes, _ in found]) for name in names
    }
    return Episodes(**columns), sum(seconds for _, seconds in found)
