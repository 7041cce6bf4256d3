"""A stand-in for Doom's engine: three rooms in a row, walked in by the same buttons."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np

from pipelines.planning.games.floor_plan import F64, FloorPlan, floor_plan
from pipelines.planning.games.worlds import GAME_WORLDS, GameWorld, Player

ROOMS = [(0, 160), (224, 384), (448, 608)]
"""Left and right edges of the rooms, which reach from 0 to 160; corridors join their middles."""
CORRIDORS = [(160, 224), (384, 448)]
STEP, TURN = 6.0, 6.0
"""Map units and degrees of one frame; a step holds its action for four."""


def rectangle(left: float, right: float, low: float, high: float, doors: str = "") -> F64:
    """The lines of a sector; `doors` has an l or r for an open side of a corridor."""
    sides = {
        "l": (left, low, left, high),
        "r": (right, low, right, high),
        "b": (left, low, right, low),
        "t": (left, high, right, high),
    }
    return np.array([(*ends, float(side not in doors)) for side, ends in sides.items()])


def sectors() -> list[F64]:
    """The lines of all sectors. A room's side with a door is a wall above it, a gap, and a wall."""
    found = [rectangle(*CORRIDORS[n], 48, 112, doors="lr") for n in range(2)]
    for number, (left, right) in enumerate(ROOMS):
        doors = ("l" if number > 0 else "") + ("r" if number < 2 else "")
        lines = [rectangle(left, right, 0, 160, doors=doors)]
        for side in doors:
            x = left if side == "l" else right
            lines.append(np.array([(x, 0, x, 48, 1), (x, 112, x, 160, 1)], np.float64))
            lines[0] = lines[0][~((lines[0][:, 0] == x) & (lines[0][:, 2] == x))]
            lines.append(np.array([(x, 48, x, 112, 0)], np.float64))
        found.append(np.concatenate(lines))
    return found


def plan() -> FloorPlan:
    """The floor plan."""
    return floor_plan(sectors())


class FakeDoom:
    """A `Game` that walks in the three rooms."""

    def __init__(self) -> None:
        self.rate = Fraction(35, 2)
        self.buttons = ("MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT")
        self.variables = ("POSITION_X", "POSITION_Y", "ANGLE")
        none = (0, 0, 0)
        self.actions = [(1, 0, 0), none, none, none, (0, 1, 0), (0, 0, 1), none, (1, 1, 0)]
        self.actions.append((1, 0, 1))

    def reset(self, seed: int) -> None:
        """Starts in a room that the seed draws."""
        rng = np.random.default_rng(seed)
        left, right = ROOMS[int(rng.integers(3))]
        self.x, self.y = rng.uniform(left + 30, right - 30), rng.uniform(30, 130)
        self.angle = float(rng.uniform(0, 360))

    def frames(self) -> dict[str, np.ndarray]:
        """A picture that shows the pose as a bright spot and two shades."""
        pixels = np.zeros((48, 64, 3), np.uint8)
        row, column = int(self.y / 160 * 40), int(self.x / 608 * 56)
        pixels[row : row + 8, column : column + 8] = 255
        pixels[..., 1] = np.maximum(pixels[..., 1], int(127 + 120 * np.sin(np.deg2rad(self.angle))))
        pixels[..., 2] = np.maximum(pixels[..., 2], int(127 + 120 * np.cos(np.deg2rad(self.angle))))
        return {"nohud": pixels}

    def state(self) -> list[float]:
        """The pose."""
        return [self.x, self.y, self.angle]

    def act(self, action: int) -> bool:
        """Walks and turns; walls stop each direction by itself."""
        forward, left, right = self.actions[action]
        self.angle = (self.angle + TURN * (left - right)) % 360
        x = self.x + STEP * forward * np.cos(np.deg2rad(self.angle))
        y = self.y + STEP * forward * np.sin(np.deg2rad(self.angle))
        self.x = x if free(x, self.y) else self.x
        self.y = y if free(self.x, y) else self.y
        return True

    def close(self) -> None:
        """Nothing to end."""


def free(x: float, y: float) -> bool:
    """Whether the player, 32 wide, can stand there."""
    in_room = any(left + 16 <= x <= right - 16 for left, right in ROOMS) and 16 <= y <= 144
    in_corridor = 16 <= x <= 592 and 64 <= y <= 96
    return in_room or in_corridor


class FakeWorld(GameWorld):
    """`my_way_home` in the stand-in."""

    def start(self) -> Player:
        """See `GameWorld.start`."""
        return Player(self, FakeDoom())


def fake_world() -> GameWorld:
    """The world."""
    return FakeWorld(**vars(replace(GAME_WORLDS["my_way_home"])))
