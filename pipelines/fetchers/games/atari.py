"""Atari 2600 games in the Arcade Learning Environment (ale-py)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from pipelines.fetchers.games.engine import U8, require

RATE = Fraction(15)  # one of the console's four frames
NOOPS = 240  # console frames, 4 s: most that pass before an episode begins
BUTTONS = ("fire", "up", "right", "left", "down")
# Rows of the 210 that show score, lives and the maker's name.
HUD_ROWS = {
    "pong": ((0, 22),),
    "breakout": ((0, 17),),
    "space_invaders": ((0, 22),),
    "seaquest": ((0, 30), (165, 210)),
    "ms_pacman": ((171, 210),),
    "enduro": ((156, 210),),
}


class AtariGame:
    """An Atari 2600 game in the Arcade Learning Environment (Bellemare et al. 2013)."""

    rate: Fraction
    buttons: tuple[str, ...]
    variables: tuple[str, ...]
    actions: list[tuple[int, ...]]

    def __init__(self, name: str) -> None:
        ale = require("ale_py")
        ale.ALEInterface.setLoggerMode(ale.LoggerMode.Error)
        self._ale, self._name = ale.ALEInterface(), name
        self._ale.setFloat("repeat_action_probability", 0.0)
        self._load(0)
        self._codes = self._ale.getMinimalActionSet()
        self.rate, self.buttons = RATE, BUTTONS
        self.variables = ("score", "lives", *(f"ram_{byte}" for byte in range(128)))
        # An action is named after the buttons it holds: UPRIGHTFIRE.
        names = [code.name.lower() for code in self._codes]
        self.actions = [tuple(int(b in name) for b in BUTTONS) for name in names]

    def _load(self, seed: int) -> None:
        self._ale.setInt("random_seed", seed)
        self._ale.loadROM(require("ale_py.roms").get_rom_path(self._name))

    def reset(self, seed: int) -> None:
        """Starts an episode: the console takes a seed only as it loads a game.

        Most games ignore it, so the episode begins after a random number of frames without input
        (Mnih et al. 2015); else the scripted policy would play the same few games under every seed.
        """
        self._load(seed)
        self._ale.reset_game()
        for _ in range(seed % NOOPS):
            self._ale.act(require("ale_py").Action.NOOP)
        self._score, self._screen = 0.0, self._ale.getScreenRGB()

    def frames(self) -> dict[str, U8]:
        """Returns the last two screens' brighter pixels: sprites are drawn in turns."""
        masked = self._screen.copy()
        for start, stop in HUD_ROWS[self._name]:
            masked[start:stop] = 0
        return {"hud": self._screen, "nohud": masked}

    def state(self) -> list[float]:
        """Returns score, lives and the 128 bytes of memory."""
        return [self._score, float(self._ale.lives()), *map(float, self._ale.getRAM())]

    def act(self, action: int) -> bool:
        """Holds an action for four frames of the console."""
        before = self._screen
        for _ in range(4):
            before = self._ale.getScreenRGB()
            self._score += self._ale.act(self._codes[action])
        self._screen = np.maximum(before, self._ale.getScreenRGB())
        return not self._ale.game_over()

    def close(self) -> None:
        """Nothing to end."""
