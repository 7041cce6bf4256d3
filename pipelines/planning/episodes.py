"""Episodes in Two-Rooms: paired starts and goals, and policies that all rows are made of.

Shape suffixes: B episodes, T steps, H steps of a plan, 2 = (x, y) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.planning.agent import Agent
from models.planning.worlds.two_rooms import TwoRooms

LEAST_DISTANCE = 8.0
"""Least distance of start and goal, pixels. From 8 pixels a random policy finds 8% of the goals in
its own room within 50 steps, from 2 pixels 20%."""
DRAWN = 64
"""Pairs that are drawn at a time."""
KINDS = ("same", "cross")
"""Whether start and goal lie in the same room or in different ones."""

Policy = Callable[[Tensor, Tensor], Tensor]
"""Maps places [B, 2] of episodes, and their numbers int64 [B], to plans [B, H, 2]."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Starts and goals, the same for every policy that is compared."""

    starts_B2: Tensor
    goals_B2: Tensor

    def part(self, rows: slice) -> Tasks:
        """Returns some of them."""
        return Tasks(starts_B2=self.starts_B2[rows], goals_B2=self.goals_B2[rows])


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """What happened."""

    reached_B: Tensor
    """Whether the goal was reached at any step, bool."""
    steps_B: Tensor
    """Steps taken, int64."""
    places_BT2: Tensor
    """The place before the first step and after each, [B, T + 1, 2]; who has arrived stays."""
    first_plans_BH2: Tensor
    """The plans of the first step."""


def draw_tasks(world: TwoRooms, kind: str, count: int, seed: int) -> Tasks:
    """Draws tasks whose goal is not near the start; the first are the same however many there are.

    Args:
        world: the world.
        kind: one of `KINDS`.
        count: B.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed * len(KINDS) + KINDS.index(kind))
    found: list[Tensor] = []
    while sum(map(len, found)) < count:
        pairs_B22 = world.sample_places(2 * DRAWN, generator).view(DRAWN, 2, 2)
        starts_B2, goals_B2 = pairs_B22.unbind(1)
        same_B = world.room(starts_B2) == world.room(goals_B2)
        apart_B = (starts_B2 - goals_B2).norm(dim=-1) >= LEAST_DISTANCE
        found.append(pairs_B22[apart_B & (same_B if kind == "same" else ~same_B)])
    starts_B2, goals_B2 = torch.cat(found)[:count].unbind(1)
    return Tasks(starts_B2=starts_B2, goals_B2=goals_B2)


def run_episodes(world: TwoRooms, policy: Policy, tasks: Tasks, steps: int) -> Episodes:
    """Runs episodes side by side until all have arrived or the steps are used up."""
    places_B2, goals_B2 = tasks.starts_B2, tasks.goals_B2
    reached_B = world.reached(places_B2, goals_B2)
    steps_B, path, first = torch.zeros(len(places_B2), dtype=torch.int64), [places_B2], None
    for _ in range(steps):
        (rows,) = (~reached_B).nonzero(as_tuple=True)
        if len(rows):
            plans_BH2 = policy(places_B2[rows], rows)
            first = plans_BH2 if first is None else first
            places_B2 = places_B2.clone()
            places_B2[rows] = world.step(places_B2[rows], plans_BH2[:, 0])
            reached_B = reached_B | world.reached(places_B2, goals_B2)
            steps_B[rows] += 1
        path.append(places_B2)
    return Episodes(
        reached_B=reached_B,
        steps_B=steps_B,
        places_BT2=torch.stack(path, dim=1),
        first_plans_BH2=torch.zeros(0, 1, 2) if first is None else first,
    )


def random_policy(world: TwoRooms, seed: int) -> Policy:
    """Returns the floor: full steps in random directions."""
    generator = torch.Generator().manual_seed(seed)

    def act(places_B2: Tensor, rows: Tensor) -> Tensor:
        angle_B = 2 * math.pi * torch.rand(len(places_B2), generator=generator)
        way_B2 = torch.stack([angle_B.cos(), angle_B.sin()], dim=-1)
        return (world.max_step * way_B2)[:, None]

    return act


def map_policy(world: TwoRooms, tasks: Tasks) -> Policy:
    """Returns the ceiling: who knows the map goes through the door."""
    return lambda places_B2, rows: world.way_out(places_B2, tasks.goals_B2[rows])[:, None]


def agent_policy(agent: Agent, observe: Callable[[Tensor], Tensor], tasks: Tasks) -> Policy:
    """Returns the policy of an agent that sees places through `observe`."""
    agent.begin(observe(tasks.goals_B2))
    return lambda places_B2, rows: agent.plan(observe(places_B2), rows)
