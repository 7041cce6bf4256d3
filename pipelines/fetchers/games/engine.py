"""What the recorder asks of a game."""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import sys
from fractions import Fraction
from pathlib import Path
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


def start_doom(game: Any, folder: Path) -> None:
    """Starts the engine of a configured `vizdoom.DoomGame`, which ends with this process.

    Args:
        game: the game; its settings stay, except for the paths of its engine and settings file.
        folder: empty folder for what the engine leaves behind.
    """
    engine = Path(require("vizdoom").__file__).with_name("vizdoom")
    guard = [sys.executable, "-IS", str(Path(__file__).with_name("guard.py")), str(os.getpid())]
    starter = folder / "vizdoom"
    starter.write_text(f'#!/bin/sh\nexec {shlex.join([*guard, str(engine)])} "$@"\n')
    starter.chmod(0o700)
    game.set_vizdoom_path(str(starter))
    game.set_doom_config_path(str(folder / "vizdoom.ini"))
    # The engine leaves its settings in the folder it starts in.
    with contextlib.chdir(folder):
        game.init()
