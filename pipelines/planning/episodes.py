"""Episodes in Two-Rooms: paired starts and goals, and policies that all rows are made of.

Shape suffixes: B episodes, T steps, H steps of a plan, 2 = (x, y) in pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from models.planning.costs.intrinsic import Zone, depth
from models.planning.worlds.two_rooms import TwoRooms

LEAST_DISTANCE = 8.0
"""Least distance of start and goal, pixels. From 8 pixels a random policy finds 8% of the goals in
its own room within 50 steps, from 2 pixels 20%."""
DRAWN = 64
"""Pairs that are drawn at a time."""
KINDS = ("same", "cross")
"""Whether start and goal lie in the same room or in different ones."""
HARDER = ("hidden", "zone")
"""In different rooms, and most frames are hidden; in the same room, with a zone to stay out of on
the straight way."""
ZONES = ((5.0, 12.0, 11.0, 20.0), (21.0, 12.0, 27.0, 20.0))
"""The zones, one in each room, in pixels."""
CLEAR = 1.0
"""Least distance of starts and goals from the zones, pixels."""
SEEN, PERIOD = 3, 8
"""Of so many frames the first so many are seen, where frames are hidden."""

Policy = Callable[[Tensor, Tensor], Tensor]
"""Maps places [B, 2] of episodes, and their numbers int64 [B], to plans [B, H, 2]."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Starts and goals, the same for every policy that is compared."""

    starts_B2: Tensor
    goals_B2: Tensor
    zones: tuple[Zone, ...] = ()
    """Regions to stay out of."""
    hides: bool = False
    """Whether frames are hidden, by `SEEN` and `PERIOD`."""

    def __len__(self) -> int:
        return len(self.starts_B2)

    def part(self, rows: slice) -> Tasks:
        """Returns some of them."""
        return replace(self, starts_B2=self.starts_B2[rows], goals_B2=self.goals_B2[rows])


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """What happened."""

    reached_B: Tensor
    """Whether the goal was reached at any step, bool."""
    entered_B: Tensor
    """Whether a zone to stay out of was entered at any step, bool."""
    steps_B: Tensor
    """Steps taken, int64."""
    places_BT2: Tensor
    """The place before the first step and after each, [B, T + 1, 2]; who has arrived stays."""
    first_plans_BH2: Tensor
    """The plans of the first step."""

    @property
    def succeeded_B(self) -> Tensor:
        """Whether the goal was reached and no zone entered, bool."""
        return self.reached_B & ~self.entered_B


def draw_tasks(world: TwoRooms, kind: str, count: int, seed: int) -> Tasks:
    """Draws tasks whose goal is not near the start; the first are the same however many there are.

    Args:
        world: the world.
        kind: one of `KINDS` or `HARDER`.
        count: B.
        seed: of the draws.
    """
    same = kind in ("same", "zone")
    generator = torch.Generator().manual_seed(seed * len(KINDS) + (not same))
    found: list[Tensor] = []
    while sum(map(len, found)) < count:
        pairs_B22 = world.sample_places(2 * DRAWN, generator).view(DRAWN, 2, 2)
        starts_B2, goals_B2 = pairs_B22.unbind(1)
        fits_B = (world.room(starts_B2) == world.room(goals_B2)) == same
        fits_B &= (starts_B2 - goals_B2).norm(dim=-1) >= LEAST_DISTANCE
        if kind == "zone":
            fits_B &= _behind_a_zone(starts_B2, goals_B2)
        found.append(pairs_B22[fits_B])
    starts_B2, goals_B2 = torch.cat(found)[:count].unbind(1)
    zones = ZONES if kind == "zone" else ()
    return Tasks(starts_B2=starts_B2, goals_B2=goals_B2, zones=zones, hides=kind == "hidden")


def _behind_a_zone(starts_B2: Tensor, goals_B2: Tensor) -> Tensor:
    """Returns whether the straight way leads through a zone, and both ends are clear of it."""
    share_T11 = torch.linspace(0, 1, 33)[:, None, None]
    ways_TB2 = starts_B2 + share_T11 * (goals_B2 - starts_B2)
    clear_2B = depth(torch.stack([starts_B2, goals_B2]), ZONES) <= -CLEAR
    return (depth(ways_TB2, ZONES) > 1).any(0) & clear_2B.all(0)


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
    places_BT2 = torch.stack(path, dim=1)
    return Episodes(
        reached_B=reached_B,
        entered_B=(depth(places_BT2, tasks.zones) > 0).any(1),
        steps_B=steps_B,
        places_BT2=places_BT2,
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


class Planner(Protocol):
    """What plans, such as `models.planning.agent.Agent`."""

    def begin(self, goals: Tensor) -> None:
        """Begins episodes, given observations of their goals."""
        ...

    def plan(self, observations: Tensor, rows: Tensor, hidden_B: Tensor | None = None) -> Tensor:
        """Returns plans whose first action is taken, [len(rows), H, A]."""
        ...


def agent_policy(agent: Planner, observe: Callable[[Tensor], Tensor], tasks: Tasks) -> Policy:
    """Returns the policy of an agent that sees places through `observe`.

    Hidden frames are black.
    """
    agent.begin(observe(tasks.goals_B2))
    moments = itertools.count()

    def act(places_B2: Tensor, rows: Tensor) -> Tensor:
        frames = observe(places_B2)
        if not tasks.hides or next(moments) % PERIOD < SEEN:
            return agent.plan(frames, rows)
        return agent.plan(torch.zeros_like(frames), rows, torch.ones_like(rows, dtype=torch.bool))

    return act
