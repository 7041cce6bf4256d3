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
import torch

from models.planning.actors.space import ActionSpace
from models.planning.configurator import Rules, TaskSpec, configure
from models.planning.costs.critic import Critic, CriticTraining, train_critic
from models.planning.costs.slow_distance import SlowDistance
from models.planning.memory import Memory
from models.planning.saved_agent import SavedAgent, agent_files
from models.planning.world_model.world_model import WorldModel
from pipelines.planning.games.floor_plan import read_floor_plan
from pipelines.planning.games.imagination import clips_of, encode_walk, open_loop
from pipelines.planning.games.navigation import KINDS, Episode, Task, draw_tasks
from pipelines.planning.games.picture import draw_curve, draw_paths
from pipelines.planning.games.predictors import tuned
from pipelines.planning.games.readout import fit_readout
from pipelines.planning.games.rows import CURVE, ROWS, GameComparison, run_part
from pipelines.planning.games.walks import Walk, walk_seed, walks
from pipelines.planning.games.worlds import GAME_WORLDS
from pipelines.planning.results import interval, summary

MEMORY = 6000
"""Transitions that the critic's graph is made of, spread evenly over the walks."""
REACH = 1.5
"""Length of the graph's longest edge, in median steps. Through a wall one sees another picture, so
that a longer edge than in Two-Rooms leads through none."""
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
    import ray

    from pipelines.runtime.cluster import start_ray

    start_ray()
    fitted, held = _walks(job)
    states = [encode_walk(job.model, one) for one in fitted]
    job = replace(job, model=tuned(job.model, states, fitted, job.predictor_steps, job.seed))
    world = GAME_WORLDS[job.env]
    readout = fit_readout(states, fitted)
    clips = clips_of([encode_walk(job.model, one) for one in held], held)
    results = open_loop(world, job.model, readout, clips)
    distance = SlowDistance.fit(states)
    files = {f"agent/{name}": data for name, data in agent_files(saved(job, distance)).items()}
    if not world.rooms:
        return results, files
    start = time.perf_counter()
    critic = critic_of(states, job.critic_steps, job.seed)
    results["critic_seconds"] = time.perf_counter() - start
    comparison = _comparison(job, critic, distance)
    tasks = _tasks(job, comparison, held)
    shared, remote = ray.put(comparison), ray.remote(num_cpus=1)(run_part)
    running = {
        (row, budget, kind): [
            remote.remote(shared, row, budget, tasks[kind][first : first + job.chunk])
            for first in range(0, job.episodes, job.chunk)
        ]
        for row, budget in reversed(comparison.rows)
        for kind in KINDS
    }
    played = {key: [e for part in ray.get(parts) for e in part] for key, parts in running.items()}
    results |= _summary(comparison, played)
    return results, files | _pictures(comparison, tasks, played, results)


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


def critic_of(states: Sequence[torch.Tensor], steps: int, seed: int) -> Critic:
    """Trains the critic on transitions of walks, given the states of each walk."""
    keys_NZ = torch.cat([one[:-1] for one in states])
    following_NZ = torch.cat([one[1:] for one in states])
    kept = torch.linspace(0, len(keys_NZ) - 1, min(MEMORY, len(keys_NZ))).long()
    memory = Memory(len(kept))
    memory.write(keys_NZ[kept], following=following_NZ[kept])
    training = CriticTraining(steps=steps, reach=REACH)
    return train_critic(memory, training, torch.Generator().manual_seed(seed))[0]


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


def _tasks(job: GameJob, comparison: GameComparison, held: Sequence[Walk]) -> dict[str, list[Task]]:
    with closing(GAME_WORLDS[job.env].start()) as player:
        return {
            kind: draw_tasks(player, comparison.plan, held, kind, job.episodes, job.seed)
            for kind in KINDS
        }


Played = dict[tuple[str, int, str], list[Episode]]
"""Episodes by row, budget and kind."""


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


def table(results: dict[str, Any]) -> list[str]:
    """Returns the lines that the command prints."""
    lines = []
    for name, rows in results["open_loop"].items():
        for row in ("model", "copy_last", "shuffled", "copy_true", "seen", "gain"):
            told = ", ".join(
                f"{step}: {e['mean']:.2f} ({e['interval'][0]:.2f} to {e['interval'][1]:.2f})"
                for step, e in rows[row].items()
            )
            lines.append(f"{name}, {rows['unit']} after steps, {row}: {told}")
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
