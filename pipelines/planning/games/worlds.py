"""Games as worlds: what an agent sees of them, what it may press, and what is known of the state.

A step of a world holds an action for some frames of the recorder's game, because one frame moves
hardly anything. What an agent presses is a row of buttons, 0 or 1 each, as recordings have them.

Shape suffixes: T frames, V variables of a game's state, P places, K choices, A buttons, H and W
pixels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.fetchers.games.engine import U8, Game
from pipelines.fetchers.games.frame_size import resize
from pipelines.fetchers.games.recording import Footage

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Something that is read out of latents, and how its error is told."""

    name: str
    columns: tuple[int, ...]
    """Its places: coordinates, or the sine and cosine of an angle."""
    kind: Literal["distance", "angle"] = "distance"
    unit: str

    def error(self, found_TP: F32, true_TP: F32) -> F32:
        """Returns the error of every row, in the unit; NaN where the truth is."""
        found, true = found_TP[..., self.columns], true_TP[..., self.columns]
        if self.kind == "distance":
            distance: F32 = np.linalg.norm(found - true, axis=-1)
            return distance
        turned = np.arctan2(found[..., 0], found[..., 1]) - np.arctan2(true[..., 0], true[..., 1])
        degrees: F32 = np.abs(np.rad2deg((turned + np.pi) % (2 * np.pi) - np.pi))
        return degrees


@dataclass(frozen=True, kw_only=True)
class GameWorld:
    """One game as a world."""

    game: str
    """Its name in `pipelines.fetchers.games.recording.GAMES`."""
    size: tuple[int, int]
    """Height and width of what is seen, pixels."""
    hold: int
    """Frames of the recorder's game in one step."""
    choices: tuple[int, ...]
    """Numbers of the game's actions that are open to the agent."""
    places: Callable[[F32, tuple[str, ...]], F32]
    """Maps states [T, V] and the names of their columns to places [T, P]."""
    quantities: tuple[Quantity, ...]
    """What is read out of the places."""
    changes: Callable[[F32, F32], F32] = operator.sub
    """Maps places after and before, [..., P] each, to what has changed, which has the same
    columns."""
    changed: Callable[[F32, F32], F32] = operator.add
    """Maps places before, and what has changed, to places after."""
    rooms: bool = False
    """Whether there are rooms to go to, that is, whether episodes are played."""

    def start(self) -> Player:
        """Starts the game.

        Raises:
            FetchError: its engine is not installed.
        """
        footage = Footage(variants=("nohud",), size=self.size, squeeze=True)
        return Player(self, footage.start(self.game))

    def shape(self) -> tuple[int, int, int]:
        """Starts the game; returns the height and width of what is seen, and its buttons.

        Raises:
            FetchError: its engine is not installed.
        """
        player = self.start()
        try:
            return (*self.size, player.choices_KA.shape[1])
        finally:
            player.close()


class Player:
    """A running game, step by step.

    Args:
        world: what it is played as.
        game: the engine.
    """

    def __init__(self, world: GameWorld, game: Game) -> None:
        self.world, self._game = world, game
        pressed = [game.actions[choice] for choice in world.choices]
        self.choices_KA = np.array(pressed, np.float32)

    def reset(self, seed: int) -> None:
        """Starts an episode that the seed fixes."""
        self._game.reset(seed)

    def see(self) -> U8:
        """Returns the picture now, [H, W, 3]."""
        return resize(self._game.frames()["nohud"], *self.world.size)

    def places(self) -> F32:
        """Returns where things are now, [P]."""
        states_1V = np.array([self._game.state()], np.float32)
        places_P: F32 = self.world.places(states_1V, self._game.variables)[0]
        return places_P

    def step(self, choice: int) -> bool:
        """Holds a choice for one step; returns whether the episode goes on."""
        action = self.world.choices[choice]
        return all(self._game.act(action) for _ in range(self.world.hold))

    def close(self) -> None:
        """Ends the game."""
        self._game.close()


def pose(states_TV: F32, names: tuple[str, ...]) -> F32:
    """Returns x, y, sine and cosine of the player of Doom, [T, 4]."""
    x_T, y_T, degrees_T = (
        states_TV[:, names.index(name)] for name in ("POSITION_X", "POSITION_Y", "ANGLE")
    )
    angle_T = np.deg2rad(degrees_T)
    return np.stack([x_T, y_T, np.sin(angle_T), np.cos(angle_T)], axis=1)


def steps_made(after: F32, before: F32) -> F32:
    """Returns how far Doom's player went ahead and to the left, and sine and cosine of its turn.

    Directions are those in which it looked before.
    """
    x, y, sine, cosine = np.moveaxis(before, -1, 0)
    later_x, later_y, later_sine, later_cosine = np.moveaxis(after, -1, 0)
    ahead = (later_x - x) * cosine + (later_y - y) * sine
    left = (later_y - y) * cosine - (later_x - x) * sine
    turn = later_sine * cosine - later_cosine * sine, later_cosine * cosine + later_sine * sine
    return np.stack([ahead, left, *turn], axis=-1).astype(np.float32)


def stepped(before: F32, steps: F32) -> F32:
    """Returns where Doom's player is after such steps; see `steps_made`."""
    x, y, sine, cosine = np.moveaxis(before, -1, 0)
    length = np.hypot(sine, cosine).clip(min=1e-6)  # of what was read off states
    sine, cosine = sine / length, cosine / length
    ahead, left, turn_sine, turn_cosine = np.moveaxis(steps, -1, 0)
    place = x + ahead * cosine - left * sine, y + ahead * sine + left * cosine
    angle = sine * turn_cosine + cosine * turn_sine, cosine * turn_cosine - sine * turn_sine
    return np.stack([*place, *angle], axis=-1).astype(np.float32)


PADDLE_X, BALL_X, BALL_Y = "ram_72", "ram_99", "ram_101"
"""Bytes of Breakout's memory (after the table of Anand et al. 2019, *Unsupervised state
representation learning in Atari*, arXiv 1906.08226)."""


def paddle_and_ball(states_TV: F32, names: tuple[str, ...]) -> F32:
    """Returns the paddle's x and the ball's x and y, [T, 3]; the latter NaN without a ball."""
    paddle_T, x_T, y_T = (states_TV[:, names.index(name)] for name in (PADDLE_X, BALL_X, BALL_Y))
    places_T3 = np.stack([paddle_T, x_T, y_T], axis=1)
    places_T3[y_T == 0, 1:] = np.nan
    return places_T3


GAME_WORLDS = {
    "my_way_home": GameWorld(
        game="my_way_home",
        size=(48, 64),
        hold=4,  # 8 tics: 0.23 s
        choices=(0, 4, 5, 7, 8),  # forward, turn left, turn right, and forward in a curve
        places=pose,
        changes=steps_made,
        changed=stepped,
        rooms=True,
        quantities=(
            Quantity(name="position", columns=(0, 1), unit="map units"),
            Quantity(name="angle", columns=(2, 3), kind="angle", unit="degrees"),
        ),
    ),
    "breakout": GameWorld(
        game="breakout",
        size=(64, 64),
        hold=1,  # 4 frames of the console
        choices=(0, 1, 2, 3),  # nothing, fire, right, left
        places=paddle_and_ball,
        quantities=(
            Quantity(name="paddle", columns=(0,), unit="pixels of the console"),
            Quantity(name="ball", columns=(1, 2), unit="pixels of the console"),
        ),
    ),
}
"""The games that are worlds, by name."""
