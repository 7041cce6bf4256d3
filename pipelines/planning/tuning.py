"""A search for the configurator's numbers on validation episodes, as trials of Ray Tune.

Every candidate has the same budget of imagined steps an action; what differs is how it is spent.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.planning.configurator import Rules, TaskSpec, configure
from pipelines.planning.episodes import KINDS, Episodes, Tasks, draw_tasks
from pipelines.planning.playing import Job, Player, run_job
from pipelines.planning.results import interval, lifts
from pipelines.planning.rows import WORLD, Comparison, Row, planner
from pipelines.runtime.uris import ray_storage

CHOICES: dict[str, tuple[Any, ...]] = {
    "method": ("cem", "icem", "mppi"),
    "horizon": (8, 12, 16, 24),
    "rounds": (1, 2, 3, 5),
    "elites": (0.05, 0.1, 0.2),
    "hazard_weight": (1.0, 4.0, 16.0),
    "recalled": (0, 4),
}
"""What the search draws from."""
VALIDATED = (*KINDS, "zone")
"""The kinds of episodes that candidates are judged on."""
VALIDATION = 2**21
"""Added to the seed of the validation episodes; no other episode has one so far away."""
ROW = Row(
    says="the trained model, judged by the critic",
    policy=lambda parts, tasks: planner(parts, tasks, critic=True),
)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings that are tried, and how they did on the validation episodes."""

    method: str
    rules: Rules
    success: float = 0.0
    """Share of the episodes."""
    steps: float = 0.0
    """Mean steps to the goal; an episode that failed counts as all steps. The least is best."""

    def applied(self, parts: Comparison) -> Comparison:
        """Returns the parts with these settings."""
        task = dataclasses.replace(parts.task, method=self.method)
        return dataclasses.replace(parts, task=task, rules=self.rules)


def draw_candidates(task: TaskSpec, rules: Rules, count: int, seed: int) -> list[Candidate]:
    """Draws settings that the budget allows; the first are those that there are.

    Raises:
        ValueError: it does not allow so many.
    """
    possible = len({Candidate(method=task.method, rules=rules), *_fitting(task, rules)})
    if count > possible:
        raise ValueError(
            f"--tune: {count} settings are more than the {possible} that --budget {task.budget} "
            "leaves"
        )
    generator, found = random.Random(seed), [Candidate(method=task.method, rules=rules)]
    while len(found) < count:
        drawn = {name: generator.choice(values) for name, values in CHOICES.items()}
        candidate = Candidate(method=drawn.pop("method"), rules=dataclasses.replace(rules, **drawn))
        if _fit(task, candidate) and candidate not in found:
            found.append(candidate)
    return found


def _fitting(task: TaskSpec, rules: Rules) -> Iterator[Candidate]:
    """Yields all that can be drawn."""
    for values in itertools.product(*CHOICES.values()):
        drawn = dict(zip(CHOICES, values, strict=True))
        candidate = Candidate(method=drawn.pop("method"), rules=dataclasses.replace(rules, **drawn))
        if _fit(task, candidate):
            yield candidate


def _fit(task: TaskSpec, candidate: Candidate) -> bool:
    try:
        configure(task, candidate.rules)
    except ValueError:
        return False
    return True


def judge(parts: Comparison, candidate: Candidate, tasks: Sequence[Tasks]) -> Candidate:
    """Runs the validation episodes with a candidate's settings."""
    changed = candidate.applied(parts)
    played = [run_job(changed, Job(row=ROW, tasks=of, name="validation"))[0] for of in tasks]
    return dataclasses.replace(
        candidate,
        success=float(np.concatenate([of.succeeded_B.numpy() for of in played]).mean()),
        steps=float(np.concatenate([_counted(of, parts.task.steps) for of in played]).mean()),
    )


def _counted(episodes: Episodes, most: int) -> npt.NDArray[np.float64]:
    """Returns the steps of each episode, those of a failed one being all steps."""
    counted_B = episodes.steps_B.masked_fill(~episodes.succeeded_B, most)
    return counted_B.numpy().astype(np.float64)


def gain(
    before: Comparison, after: Comparison, tasks: Mapping[str, Tasks], player: Player
) -> dict[str, Any]:
    """Measures what a search has gained, on episodes that nothing was chosen on.

    Args:
        before: the parts with the settings that there were.
        after: the parts with those that were found.
        tasks: episodes by kind.
        player: plays them.

    Returns:
        By kind how much more often the second succeed (`success`), and in how many fewer steps
        (`fewer_steps`), both paired by episode and with 95% intervals.
    """
    old, new = (
        dict(zip(tasks, player.play(parts, _jobs(tasks, name)), strict=True))
        for parts, name in ((before, "settings as they were"), (after, "settings that were found"))
    )
    return {kind: _gained(old[kind], new[kind], before.task.steps) for kind in tasks}


def _jobs(tasks: Mapping[str, Tasks], name: str) -> list[Job]:
    return [Job(row=ROW, tasks=of, name=f"{name}, {kind}") for kind, of in tasks.items()]


def _gained(old: tuple[Episodes, float], new: tuple[Episodes, float], most: int) -> dict[str, Any]:
    fewer_B = _counted(old[0], most) - _counted(new[0], most)
    more, less = ({"success": of.succeeded_B.numpy()} for of, _ in (new, old))
    return {
        **lifts(more, less),
        "fewer_steps": {"lift": float(fewer_B.mean()), "interval": interval(fewer_B)},
    }


def _trial(
    config: dict[str, int],
    parts: Comparison,
    candidates: Sequence[Candidate],
    tasks: Sequence[Tasks],
) -> None:
    from ray import tune

    found = judge(parts, candidates[config["candidate"]], tasks)
    tune.report({"success": found.success, "steps": found.steps})


def search(
    parts: Comparison,
    *,
    candidates: int,
    episodes: int,
    seed: int,
    out: str,
) -> list[Candidate]:
    """Judges candidates in parallel trials; returns them, the best first.

    Args:
        parts: what the agent is made of.
        candidates: how many are tried; the first is the one that there is.
        episodes: validation episodes of each kind.
        seed: of the candidates and of the episodes.
        out: folder for Ray Tune's files.

    Raises:
        ValueError: there are not so many.
        RuntimeError: a trial failed.
    """
    from ray import tune

    from pipelines.runtime.cluster import start_ray

    drawn = draw_candidates(parts.task, parts.rules, candidates, seed)
    start_ray()
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the newer output cannot be silenced
    tasks = [draw_tasks(WORLD, kind, episodes, VALIDATION + seed) for kind in VALIDATED]
    trainable = tune.with_parameters(_trial, parts=parts, candidates=drawn, tasks=tasks)
    path, filesystem = ray_storage(out)
    grid = tune.Tuner(
        tune.with_resources(trainable, {"CPU": 1}),
        param_space={"candidate": tune.grid_search(list(range(len(drawn))))},
        run_config=tune.RunConfig(
            name="tune", storage_path=path, storage_filesystem=filesystem, verbose=0
        ),
    ).fit()
    found = []
    for result in (grid[number] for number in range(len(grid))):
        if result.error is not None:
            raise RuntimeError(f"--tune: a trial failed: {result.error}")
        assert result.metrics is not None
        number = result.metrics["config"]["candidate"]
        figures = {name: result.metrics[name] for name in ("success", "steps")}
        found.append(dataclasses.replace(drawn[number], **figures))
    return sorted(found, key=lambda candidate: candidate.steps)
