"""Compares what plans in a game: walks, critic, readout, episodes and their summary.

Shape suffixes: Z width of a state.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from models.planning.actors.space import ActionSpace
from models.planning.configurator import Rules, TaskSpec, configure
from models.planning.costs.critic import Critic
from models.planning.costs.slow_distance import SlowDistance
from models.planning.saved_agent import SavedAgent, agent_files
from models.planning.world_model.world_model import WorldModel
from pipelines.planning.games.fitting import critic_of, distance_of
from pipelines.planning.games.floor_plan import read_floor_plan
from pipelines.planning.games.imagination import (
    clips_of,
    encode_walk,
    open_loop,
    read_changes,
    read_places,
)
from pipelines.planning.games.navigation import KINDS, Episode, Task, draw_tasks
from pipelines.planning.games.picture import draw_curve, draw_paths
from pipelines.planning.games.predictors import restated, tuned
from pipelines.planning.games.rows import CURVE, ROWS, GameComparison, run_part
from pipelines.planning.games.walks import Walk, walk_seed, walks
from pipelines.planning.games.worlds import GAME_WORLDS
from pipelines.planning.results import interval, summary

SHOWN = (
    *("model", "composed", "copy_last", "shuffled", "copy_true", "seen"),
    *("gain", "gain_composed"),
)
"""Rows of what is imagined, in the order in which they are printed."""
HELD_OUT = 4
"""Share of the walks, one in so many, that nothing is fitted on: they give errors and goals."""


@dataclass(frozen=True, kw_only=True)
class GameJob:
    """What is compared, and how long."""

    env: str
    model: WorldModel
    untrained: WorldModel
    settings: Mapping[str, Any]
    """What the model is built from; see `models.planning.saved_agent`."""
    checkpoint: str
    """Where it comes from."""
    task: TaskSpec
    rules: Rules
    budgets: tuple[int, ...]
    """Further budgets of the row `rows.CURVE`."""
    episodes: int
    """Episodes of every row and kind."""
    walks: int
    critic_steps: int
    predictor_steps: int
    """Steps in which the predictors learn on from the walks; see `predictors.tuned`."""
    seed: int
    chunk: int
    """Episodes of one Ray task."""


def compare(job: GameJob) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Measures what the model imagines and, where a game has rooms, runs all rows.

    Returns:
        The results, and files by name: pictures, and the agent of the row `rows.CURVE`.

    Raises:
        FetchError: the game's engine is not installed.
    """
    from pipelines.runtime.cluster import start_ray

    start_ray()
    fitted, held = _walks(job)
    tasks = _tasks(job, held)  # before anything that takes long: the walks may show too few goals
    states = [encode_walk(job.model, one) for one in fitted]
    job = replace(job, model=tuned(job.model, states, fitted, job.predictor_steps, job.seed))
    states = [restated(job.model, one) for one in states]
    results = _imagination(job, states, fitted, held)
    distance = distance_of(job.model, states)
    files = {f"agent/{name}": data for name, data in agent_files(saved(job, distance)).items()}
    if tasks:
        start = time.perf_counter()
        critic = critic_of(job.model, states, job.critic_steps, job.seed)
        results["critic_seconds"] = time.perf_counter() - start
        comparison = _comparison(job, critic, distance)
        played = _played(job, comparison, tasks)
        results |= _summary(comparison, played)
        files |= _pictures(comparison, tasks, played, results)
    return results, files


def _imagination(
    job: GameJob, states: list[Tensor], fitted: list[Walk], held: list[Walk]
) -> dict[str, Any]:
    """Measures what is imagined of walks that nothing was fitted on."""
    world = GAME_WORLDS[job.env]
    return open_loop(
        world,
        job.model,
        read_places(job.model, states, fitted),
        read_changes(world, job.model, clips_of(states, fitted)),
        clips_of([encode_walk(job.model, one) for one in held], held),
    )


def saved(job: GameJob, distance: SlowDistance) -> SavedAgent:
    """Returns the agent of the row `rows.CURVE`, to be saved."""
    world = GAME_WORLDS[job.env]
    with closing(world.start()) as player:
        choices = tuple(map(tuple, player.choices_KA.tolist()))
    return SavedAgent(
        model=job.model,
        settings=job.settings,
        critic=None,
        distance=distance,
        readout=None,
        actions=ActionSpace(width=len(choices[0]), choices=choices),
        world=job.env,
        frame=world.size,
        task=job.task,
        rules=job.rules,
        provenance={"checkpoint": job.checkpoint, "seed": job.seed},
    )


def _walks(job: GameJob) -> tuple[list[Walk], list[Walk]]:
    """Walks in Ray tasks; returns those that things are fitted on, and those held out."""
    import ray

    remote = ray.remote(num_cpus=1)(walks)
    found: list[list[Walk]] = []
    for test, count in ((False, job.walks), (True, max(1, job.walks // HELD_OUT))):
        seeds = [walk_seed(job.seed + 1, index, test=test) for index in range(count)]
        parts = [
            remote.remote(job.env, seeds[first : first + job.chunk])
            for first in range(0, count, job.chunk)
        ]
        found.append([one for part in ray.get(parts) for one in part])
    return found[0], found[1]


def _comparison(job: GameJob, critic: Critic, distance: SlowDistance) -> GameComparison:
    budgets = (job.task.budget, *job.budgets)
    return GameComparison(
        env=job.env,
        model=job.model,
        untrained=job.untrained,
        critic=critic,
        distance=distance,
        plan=read_floor_plan(GAME_WORLDS[job.env].game),
        configs={b: configure(replace(job.task, budget=b), job.rules) for b in budgets},
        steps=job.task.steps,
    )


def _tasks(job: GameJob, held: Sequence[Walk]) -> dict[str, list[Task]]:
    """Draws the tasks of every kind; there are none where there are no rooms."""
    world = GAME_WORLDS[job.env]
    if not world.rooms:
        return {}
    plan = read_floor_plan(world.game)
    with closing(world.start()) as player:
        return {
            kind: draw_tasks(player, plan, held, kind, job.episodes, job.seed) for kind in KINDS
        }


Played = dict[tuple[str, int, str], list[Episode]]
"""Episodes by row, budget and kind."""


def _played(job: GameJob, comparison: GameComparison, tasks: dict[str, list[Task]]) -> Played:
    """Plays all rows in Ray tasks."""
    import ray

    shared, remote = ray.put(comparison), ray.remote(num_cpus=1)(run_part)
    running = {
        (row, budget, kind): [
            remote.remote(shared, row, budget, tasks[kind][first : first + job.chunk])
            for first in range(0, job.episodes, job.chunk)
        ]
        for row, budget in reversed(comparison.rows)
        for kind in KINDS
    }
    return {key: [e for part in ray.get(parts) for e in part] for key, parts in running.items()}


def _summary(comparison: GameComparison, played: Played) -> dict[str, Any]:
    first, kinds = next(iter(comparison.configs)), list(KINDS)
    reached = {
        row: {kind: np.array([e.reached for e in played[row, first, kind]]) for kind in kinds}
        for row in ROWS
    }
    found = summary(reached)
    for row, of in found["rows"].items():
        for kind, cell in of.items():
            covered = np.array([e.covered for e in played[row, first, kind]])
            cell["covered"] = float(covered.mean())
            cell["covered_interval"] = interval(covered)
    floor = reached["random"]
    found["gain_over_random"] = {
        row: {kind: _paired(reached[row][kind], floor[kind]) for kind in kinds} for row in ROWS
    }
    found["curve"] = [_point(comparison, played, budget) for budget in sorted(comparison.configs)]
    return found


def _paired(reached_B: np.ndarray[Any, Any], floor_B: np.ndarray[Any, Any]) -> dict[str, Any]:
    gain_B = reached_B.astype(np.float64) - floor_B
    return {"gain": float(gain_B.mean()), "interval": interval(gain_B)}


def _point(comparison: GameComparison, played: Played, budget: int) -> dict[str, Any]:
    """Returns success and speed of the row `CURVE` at one budget."""
    of = {kind: played[CURVE, budget, kind] for kind in KINDS}
    episodes = [episode for kind in KINDS for episode in of[kind]]
    decisions = sum(e.steps for e in episodes) / max(sum(e.decisions for e in episodes), 1e-9)
    search = comparison.configs[budget].search
    rows = {}
    for kind in KINDS:
        reached = np.array([e.reached for e in of[kind]])
        rows[kind] = {"rate": float(reached.mean()), "interval": interval(reached)}
    return {
        "budget": budget,
        "decisions_per_second": decisions,
        "plans_per_second": decisions * search.samples * search.rounds,
        "rows": rows,
    }


def _pictures(
    comparison: GameComparison,
    tasks: dict[str, list[Task]],
    played: Played,
    results: dict[str, Any],
) -> dict[str, bytes]:
    first = next(iter(comparison.configs))
    panels = []
    for kind in ("one", "two"):
        for row in ("random", CURVE):
            episodes = played[row, first, kind]
            rate = np.mean([e.reached for e in episodes])
            title = f"{row}, goal {KINDS[kind]} room(s) away: {rate:.0%}"
            panels.append((title, tasks[kind], episodes))
    return {
        "trajectories.png": draw_paths(comparison.plan, panels),
        "budget.png": draw_curve(results["curve"], results["rows"]),
    }


def _cells(steps: dict[str, Any]) -> str:
    return ", ".join(
        f"{step}: {e['mean']:.2f} ({e['interval'][0]:.2f} to {e['interval'][1]:.2f})"
        for step, e in steps.items()
    )


def table(results: dict[str, Any]) -> list[str]:
    """Returns the lines that the command prints."""
    lines = []
    for what, quantities in (("", "open_loop"), ("change of ", "changes")):
        for name, rows in results[quantities].items():
            lines += [
                f"{what}{name}, {rows['unit']} after steps, {row}: {_cells(rows[row])}"
                for row in SHOWN
                if row in rows
            ]
    for row, kinds in results.get("rows", {}).items():
        cells = [
            f"{kind} {of['rate']:.0%} ({of['interval'][0]:.0%} to {of['interval'][1]:.0%}; "
            f"{of['covered']:.0%} of the way)"
            for kind, of in kinds.items()
        ]
        lines.append(f"{row:12} {', '.join(cells)}  {ROWS[row]}")
    for point in results.get("curve", ()):
        told = ", ".join(f"{kind} {of['rate']:.0%}" for kind, of in point["rows"].items())
        lines.append(
            f"{point['budget']:7,} imagined steps an action, {point['plans_per_second']:,.0f} "
            f"plans and {point['decisions_per_second']:.1f} decisions a second: {told}"
        )
    return lines
