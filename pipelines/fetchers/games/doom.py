"""Scenarios of Doom in ViZDoom (vizdoom, with Freedoom's art)."""

from __future__ import annotations

import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipelines.fetchers.games.doom_view import VIEW_VARIABLES, view_values
from pipelines.fetchers.games.engine import U8, require, start_doom
from pipelines.runtime.errors import FetchError

RATE = Fraction(35, 2)  # every second tic
SCENARIOS = ("health_gathering", "defend_the_center", "deadly_corridor", "my_way_home")
BUTTONS = (
    *("MOVE_FORWARD", "MOVE_BACKWARD", "MOVE_LEFT", "MOVE_RIGHT"),
    *("TURN_LEFT", "TURN_RIGHT", "ATTACK"),
)
GAME_VARIABLES = (
    *("HEALTH", "ARMOR", "SELECTED_WEAPON_AMMO", "KILLCOUNT", "DAMAGE_TAKEN"),
    *("POSITION_X", "POSITION_Y", "POSITION_Z", "ANGLE", "VELOCITY_X", "VELOCITY_Y"),
)
ENGINE_SIZE = (120, 160)


class DoomGame:
    """A scenario of ViZDoom (Kempka et al. 2016).

    The engine without HUD tells the state. For the variant `hud` a second engine plays in step.

    Args:
        name: one of `SCENARIOS`.
        own_hud: also play with the game's own HUD.
        size: height and width that frames will have; the engine draws at the smallest of its
            resolutions that is at least so large and has the nearest aspect. None draws 120 x 160.
    """

    rate: Fraction
    buttons: tuple[str, ...]
    variables: tuple[str, ...]
    actions: list[tuple[int, ...]]

    def __init__(
        self, name: str, own_hud: bool = True, size: tuple[int, int] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rayjepa-doom-")
        resolution = engine_resolution(size or ENGINE_SIZE)
        variants = ("hud", "nohud") if own_hud else ("nohud",)
        self._games = {v: self._start(name, v == "hud", resolution) for v in variants}
        self.rate, self.buttons = RATE, BUTTONS
        self.variables = (*GAME_VARIABLES, *VIEW_VARIABLES)
        one = [tuple(int(b == name) for b in BUTTONS) for name in BUTTONS]
        turning = [(1, 0, 0, 0, 1, 0, 0), (1, 0, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, 0, 1)]
        self.actions = [*one, *turning]

    def _start(self, name: str, hud: bool, resolution: str) -> Any:
        doom = require("vizdoom")
        self._of = [getattr(doom.GameVariable, name) for name in GAME_VARIABLES]
        game = doom.DoomGame()
        game.load_config(str(Path(doom.scenarios_path) / f"{name}.cfg"))
        game.set_available_buttons([getattr(doom.Button, name) for name in BUTTONS])
        game.set_screen_resolution(getattr(doom.ScreenResolution, resolution))
        game.set_screen_format(doom.ScreenFormat.RGB24)
        game.set_window_visible(False)
        game.set_mode(doom.Mode.PLAYER)
        game.set_render_hud(hud)
        game.set_labels_buffer_enabled(not hud)
        game.set_depth_buffer_enabled(not hud)
        folder = Path(self._folder.name) / ("hud" if hud else "nohud")
        folder.mkdir()
        start_doom(game, folder)
        return game

    def reset(self, seed: int) -> None:
        """Starts an episode in every engine."""
        for game in self._games.values():
            game.set_seed(seed)
            game.new_episode()

    def frames(self) -> dict[str, U8]:
        """Returns what the player sees; without HUD it is drawn anew, nothing is masked."""
        return {v: game.get_state().screen_buffer for v, game in self._games.items()}

    def state(self) -> list[float]:
        """Returns `GAME_VARIABLES`, then `VIEW_VARIABLES` of the picture without HUD."""
        values = [[g.get_game_variable(of) for of in self._of] for g in self._games.values()]
        assert all(value == values[0] for value in values), "the engines have parted"
        at = [values[0][GAME_VARIABLES.index(f"POSITION_{axis}")] for axis in "XY"]
        return [*values[0], *view_values(self._games["nohud"].get_state(), at)]

    def act(self, action: int) -> bool:
        """Holds an action for two tics.

        Raises:
            FetchError: an engine, which is a process of its own, crashed.
        """
        buttons = [float(button) for button in self.actions[action]]
        try:
            for game in self._games.values():
                game.make_action(buttons, 2)
        except require("vizdoom").ViZDoomErrorException as error:
            raise FetchError(
                f"Doom's engine crashed ({error}): run the same command again, which keeps the "
                "episodes that are complete"
            ) from error
        return not any(game.is_episode_finished() for game in self._games.values())

    def close(self) -> None:
        """Ends the engines."""
        for game in self._games.values():
            game.close()
        self._folder.cleanup()


def engine_resolution(size: tuple[int, int]) -> str:
    """Returns the name of the engine's resolution for frames of a height and a width.

    Among those that are at least as large in both, it is the one of the nearest aspect, and of
    these the smallest.

    Raises:
        ValueError: the engine has none as large.
    """
    names = [n for n in dir(require("vizdoom").ScreenResolution) if n.startswith("RES_")]
    sides = {name: tuple(map(int, name.removeprefix("RES_").split("X"))) for name in names}
    fitting = [n for n, (w, h) in sides.items() if h >= size[0] and w >= size[1]]
    if not fitting:
        raise ValueError(f"--size: Doom's engine draws at most 1200x1920, got {size[0]}x{size[1]}")

    def misfit(name: str) -> tuple[float, int]:
        width, height = sides[name]
        larger, smaller = sorted((width * size[0], height * size[1]), reverse=True)
        return round(larger / smaller, 2), width

    return min(fitting, key=misfit)
