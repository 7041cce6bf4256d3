"""Distils a policy from what a planner does, and measures what both cost an action.

Shape suffixes: B episodes, D latent width, A action width, 2 = (x, y) in pixels.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
from torch import Tensor

from models.planning.actors.policy import Examples, PolicyTraining, train_policy
from models.planning.actors.policy import Policy as Distilled
from pipelines.planning.episodes import KINDS, Policy, Tasks, draw_tasks, run_episodes
from pipelines.planning.playing import Player, chunked, in_order
from pipelines.planning.rows import DISTILLED, ROWS, WORLD, Comparison

TEACHER = ROWS["ours_critic"]
TIMED = 30
"""Actions that are timed, one episode at a time."""


def watched(parts: Comparison, tasks: Tasks, actor: Policy | None = None) -> Examples:
    """Runs episodes and keeps what the teacher would do in every state.

    Args:
        parts: what teacher and policies are made of.
        tasks: the episodes.
        actor: acts in the teacher's place, who then only says what it would do; None for none.
    """
    torch.set_num_threads(1)
    teacher = TEACHER.policy(parts, tasks)
    with torch.no_grad():
        goals_BD = parts.trained.model.encode(WORLD.render(tasks.goals_B2))
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def act(places_B2: Tensor, rows: Tensor) -> Tensor:
        plans_BHA = teacher(places_B2, rows)
        with torch.no_grad():
            latents_BD = parts.trained.model.encode(WORLD.render(places_B2))
        kept.append((latents_BD, goals_BD[rows], plans_BHA[:, 0]))
        return plans_BHA if actor is None else actor(places_B2, rows)

    run_episodes(WORLD, act, tasks, parts.task.steps)
    latents_ND, goals_ND, actions_NA = map(torch.cat, zip(*kept, strict=True))
    return Examples(latents_ND=latents_ND, goals_ND=goals_ND, actions_NA=actions_NA)


def distil(parts: Comparison, episodes: int, seed: int, player: Player) -> Comparison:
    """Returns the parts with a policy that has learned from the teacher's episodes.

    Half of the episodes the teacher plays itself. The other half plays a policy that has learned
    from the first half, and the teacher says what it would do there.

    Args:
        parts: with the planner that teaches.
        episodes: of each kind.
        seed: of starts, goals and training; not that of the episodes that are reported.
        player: runs them.
    """
    found = list[Examples]()
    for rows in (slice(0, episodes // 2), slice(episodes // 2, episodes)):
        drawn = [draw_tasks(WORLD, kind, episodes, seed).part(rows) for kind in KINDS]
        divided = [one for of in drawn for one in chunked(of, player.chunk)]
        found += in_order(player.each(parts, _watched_chunk, divided))
        parts = dataclasses.replace(parts, distilled=learned(found, seed))
    return parts


def _watched_chunk(parts: Comparison, tasks: Tasks) -> Examples:
    actor = None if parts.distilled is None else DISTILLED.policy(parts, tasks)
    return watched(parts, tasks, actor)


def learned(found: list[Examples], seed: int) -> Distilled:
    """Returns a policy that does as all the examples do."""
    examples = found[0]
    for more in found[1:]:
        examples = examples + more
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        return train_policy(examples, PolicyTraining(), generator)[0]


def milliseconds_an_action(parts: Comparison, seed: int) -> dict[str, float]:
    """Returns the median time from a place to an action, frames drawn and encoded, one episode.

    Both rows take turns, so that whatever else runs on the machine meets both.
    """
    tasks = draw_tasks(WORLD, "cross", 1, seed)
    policies = {
        "ours_critic": TEACHER.policy(parts, tasks),
        "distilled": DISTILLED.policy(parts, tasks),
    }
    times: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(TIMED):
        for name, policy in policies.items():
            start = time.perf_counter()
            policy(tasks.starts_B2, torch.zeros(1, dtype=torch.int64))
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(of) for name, of in times.items()}
