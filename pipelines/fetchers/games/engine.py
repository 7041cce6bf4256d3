"""What the recorder asks of a game."""

from __future__ import annotations

import importlib
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipelines.runtime.errors import FetchError

U8 = npt.NDArray[np.uint8]


class Game(Protocol):
    """One game, played frame by frame."""

    rate: Fraction
    buttons: tuple[str, ...]
    variables: tuple[str, ...]
    actions: list[tuple[int, ...]]  # 0 or 1 a button

    def reset(self, seed: int) -> None:
        """Starts an episode."""

    def frames(self) -> dict[str, U8]:
        """Returns the game's picture now, [H, W, 3], with its own HUD (`hud`) and without."""

    def state(self) -> list[float]:
        """Returns the value of each variable now."""

    def act(self, action: int) -> bool:
        """Holds an action's buttons for one frame; returns whether the episode goes on."""

    def close(self) -> None:
        """Ends the game."""


def require(module: str) -> Any:
    """Imports a game engine.

    Raises:
        FetchError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = 'pip install -e ".[games]" -c constraints.txt'
        raise FetchError(f"gameplay needs the extra `games`: {install} ({error})") from error
