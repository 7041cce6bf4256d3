"""Tasks and episodes of going to where a picture was taken, in the rooms of Doom.

Shape suffixes: T frames, N cells, P places, A buttons, H and W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.keyed_random.arrays import key_of
from models.planning.agent import Agent
from pipelines.fetchers.games.engine import U8
from pipelines.planning.games.floor_plan import FloorPlan
from pipelines.planning.games.imagination import stacked
from pipelines.planning.games.walks import HeldChoices, Walk
from pipelines.planning.games.worlds import F32, Player

REACHED = 48.0
"""A goal counts as reached when the way to it is at most as long, map units; a room is 160 wide."""
LEAST_WAY = 96.0
"""Least way from start to goal, map units."""
KINDS = {"same": 0, "one": 1, "two": 2}
"""How many rooms away the goal is."""
FORWARD, LEFT, RIGHT, FORWARD_LEFT, FORWARD_RIGHT = range(5)
"""The choices of `worlds.GAME_WORLDS["my_way_home"]`."""
TRIES = 300
"""Starts that are drawn for a task at most, on average."""
LOOK_AHEAD = 6
"""Cells on the shortest way that the oracle looks ahead."""
STRAIGHT, CURVE = np.deg2rad(12), np.deg2rad(40)
"""Up to which angle to its next place the oracle walks straight on, and in a curve."""
STANDS = 2.0
"""A step that is shorter has not moved, map units."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A start that a seed of the game fixes, and a goal that a picture shows."""

    seed: int
    start_P: F32
    goal_HW3: U8
    goal_P: F32


@dataclass(frozen=True, kw_only=True)
class Episode:
    """What happened."""

    reached: bool
    steps: int
    path_TP: F32
    """The place before the first step and after each."""
    covered: float
    """Which share of the way was covered at best."""
    decisions: float
    """Seconds that choosing took, all steps together."""


Policy = Callable[[list[U8], F32], int]
"""Maps the frames so far and the place, which only oracles read, to the number of a choice."""


def draw_tasks(
    player: Player, plan: FloorPlan, walks: Sequence[Walk], kind: str, count: int, seed: int
) -> list[Task]:
    """Draws tasks; the first are the same however many there are.

    Args:
        player: starts the episodes.
        plan: says what is how many rooms away.
        walks: their frames are the goals.
        kind: one of `KINDS`.
        count: of tasks.
        seed: of the draws.

    Raises:
        ValueError: the walks show hardly any such goal.
    """
    frames = np.concatenate([walk.frames_THW3 for walk in walks])
    places = np.concatenate([walk.places_TP for walk in walks])
    cells = np.array([plan.cell(place) for place in places])
    rooms = np.array([plan.room(place) for place in places])
    found: list[Task] = []
    number = 0
    while len(found) < count:
        if number >= TRIES * count:
            raise ValueError(
                f"--walks: {len(walks)} held-out walks show too few goals {KINDS[kind]} rooms away "
                "from where episodes start; use more"
            )
        key = int(key_of(seed, KINDS[kind], number) >> np.uint64(33))
        number += 1
        player.reset(key)
        start_P = player.places()
        room, ways_N = plan.room(start_P), plan.ways(start_P)
        so_far_away = plan.apart_SS[room, rooms] == KINDS[kind]
        (fitting,) = np.nonzero((rooms >= 0) & so_far_away & (ways_N[cells] >= LEAST_WAY))
        if room < 0 or not len(fitting):
            continue
        goal = int(np.random.default_rng(key).choice(fitting))
        found.append(Task(seed=key, start_P=start_P, goal_HW3=frames[goal], goal_P=places[goal]))
    return found


def run_episode(player: Player, plan: FloorPlan, policy: Policy, task: Task, steps: int) -> Episode:
    """Runs one episode until it has arrived or the steps are used up."""
    ways_N = plan.ways(task.goal_P)
    player.reset(task.seed)
    frames, path = [player.see()], [player.places()]
    left, seconds = [float(ways_N[plan.cell(path[0])])], 0.0
    goes_on = True
    while goes_on and left[-1] > REACHED and len(path) <= steps:
        start = time.perf_counter()
        choice = policy(frames, path[-1])
        seconds += time.perf_counter() - start
        goes_on = player.step(choice)
        if goes_on:
            frames.append(player.see())
            path.append(player.places())
            left.append(float(ways_N[plan.cell(path[-1])]))
    return Episode(
        reached=left[-1] <= REACHED,
        steps=len(path) - 1,
        path_TP=np.stack(path),
        covered=1 - max(0.0, min(left) - REACHED) / (left[0] - REACHED),
        decisions=seconds,
    )


def random_policy(count: int, seed: int) -> Policy:
    """Returns the floor: choices at random, held for some steps as in the walks."""
    choose = HeldChoices(count, np.random.default_rng(seed))
    return lambda frames, place_P: choose()


def map_policy(plan: FloorPlan, task: Task) -> Policy:
    """Returns the ceiling: who knows the map and the place takes the shortest way."""
    ways_N = plan.ways(task.goal_P)
    before_2 = np.full(2, np.inf)

    def act(frames: list[U8], place_P: F32) -> int:
        nonlocal before_2
        stands, before_2 = np.linalg.norm(place_P[:2] - before_2) < STANDS, place_P[:2]
        target_2 = plan.ahead(plan.cell(place_P), ways_N, LOOK_AHEAD)
        x, y = target_2 - place_P[:2]
        heading = np.arctan2(place_P[2], place_P[3])
        turn = (np.arctan2(y, x) - heading + np.pi) % (2 * np.pi) - np.pi
        # Who stands although it walked has a wall ahead, along which a curve slides.
        if abs(turn) <= STRAIGHT and not stands:
            return FORWARD
        if abs(turn) <= CURVE:
            return FORWARD_LEFT if turn > 0 else FORWARD_RIGHT
        return LEFT if turn > 0 else RIGHT

    return act


def agent_policy(agent: Agent, history: int, choices_KA: F32, task: Task) -> Policy:
    """Returns the policy of an agent that sees the last `history` frames."""
    agent.begin(stacked(task.goal_HW3[None], 1))
    choices = torch.from_numpy(choices_KA)

    def act(frames: list[U8], place_P: F32) -> int:
        seen = stacked(np.stack(frames[-history:]), history)[-1:]
        plan_HA: Tensor = agent.plan(seen, torch.zeros(1, dtype=torch.int64))[0]
        return int((choices == plan_HA[0]).all(-1).int().argmax())

    return act
