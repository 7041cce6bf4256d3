"""Records games as labelled video: Atari 2600 (ale-py) and Doom (vizdoom, with Freedoom's art).

    pip install -e ".[games]" -c constraints.txt
    python -m pipelines.fetch gameplay --out data/gameplay --minutes 30

    OUT/{hud,nohud}/<game>/<policy>-<seed>-<episode>
        .mp4            the same episode with HUD and without
        .actions.npy    float32 [frames, buttons], 0 or 1
        .states.npy     float32 [frames, variables]
    OUT/columns.json    the names of the columns, by game

Row t holds the state that frame t shows and the action taken in it. Without HUD, Doom is drawn anew
and Atari's score and lives are painted black. `--side 84` squeezes the whole screen into a square
of 84 pixels, as agents that play these games see it (Mnih et al. 2015): the square that training
and evaluation cut out of a wide or high screen would leave its edges out, and the HUD with them.
The same seed gives the same files; an episode that is there already is not played again.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.progress import track

from pipelines.ingestion.preparing.mp4 import Mp4Writer, save_array
from pipelines.runtime.errors import FetchError

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

POLICIES = ("random", "scripted")
VARIANTS = ("hud", "nohud")
LONGEST_EPISODE = 60  # seconds
STICKY = 0.9  # chance that the random policy does the same again
HOLD = 12  # frames for which the scripted policy holds an action

ATARI_RATE = Fraction(15)  # one of the console's four frames
NOOPS = 240  # console frames, 4 s: most that pass before an episode begins
ATARI_BUTTONS = ("fire", "up", "right", "left", "down")
# Rows of the 210 that show score, lives and the maker's name.
ATARI_HUD = {
    "pong": ((0, 22),),
    "breakout": ((0, 17),),
    "space_invaders": ((0, 22),),
    "seaquest": ((0, 30), (165, 210)),
    "ms_pacman": ((171, 210),),
    "enduro": ((156, 210),),
}
DOOM_RATE = Fraction(35, 2)  # every second tic
DOOM_GAMES = ("health_gathering", "defend_the_center", "deadly_corridor", "my_way_home")
DOOM_BUTTONS = (
    *("MOVE_FORWARD", "MOVE_BACKWARD", "MOVE_LEFT", "MOVE_RIGHT"),
    *("TURN_LEFT", "TURN_RIGHT", "ATTACK"),
)
DOOM_VARIABLES = (
    *("HEALTH", "ARMOR", "SELECTED_WEAPON_AMMO", "KILLCOUNT", "DAMAGE_TAKEN"),
    *("POSITION_X", "POSITION_Y", "POSITION_Z", "ANGLE", "VELOCITY_X", "VELOCITY_Y"),
)
GAMES = (*ATARI_HUD, *DOOM_GAMES)


class Game(Protocol):
    """One game, played frame by frame."""

    rate: Fraction
    buttons: tuple[str, ...]
    variables: tuple[str, ...]
    actions: list[tuple[int, ...]]  # 0 or 1 a button

    def reset(self, seed: int) -> None:
        """Starts an episode."""

    def frames(self) -> dict[str, U8]:
        """Returns what is seen now, [H, W, 3], by variant."""

    def state(self) -> list[float]:
        """Returns the value of each variable now."""

    def act(self, action: int) -> bool:
        """Holds an action's buttons for one frame; returns whether the episode goes on."""

    def close(self) -> None:
        """Ends the game."""


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
        self.rate, self.buttons = ATARI_RATE, ATARI_BUTTONS
        self.variables = ("score", "lives", *(f"ram_{byte}" for byte in range(128)))
        # An action is named after the buttons it holds: UPRIGHTFIRE.
        names = [code.name.lower() for code in self._codes]
        self.actions = [tuple(int(b in name) for b in ATARI_BUTTONS) for name in names]

    def _load(self, seed: int) -> None:
        self._ale.setInt("random_seed", seed)
        self._ale.loadROM(require("ale_py").roms.get_rom_path(self._name))

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
        for start, stop in ATARI_HUD[self._name]:
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


class DoomGame:
    """A scenario of ViZDoom (Kempka et al. 2016), played twice in step: with HUD and without."""

    rate: Fraction
    buttons: tuple[str, ...]
    variables: tuple[str, ...]
    actions: list[tuple[int, ...]]

    def __init__(self, name: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rayjepa-doom-")
        self._games = {variant: self._start(name, variant == "hud") for variant in VARIANTS}
        self.rate, self.buttons, self.variables = DOOM_RATE, DOOM_BUTTONS, DOOM_VARIABLES
        one = [tuple(int(b == name) for b in DOOM_BUTTONS) for name in DOOM_BUTTONS]
        turning = [(1, 0, 0, 0, 1, 0, 0), (1, 0, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, 0, 1)]
        self.actions = [*one, *turning]

    def _start(self, name: str, hud: bool) -> Any:
        doom = require("vizdoom")
        self._of = [getattr(doom.GameVariable, name) for name in DOOM_VARIABLES]
        game = doom.DoomGame()
        game.load_config(str(Path(doom.scenarios_path) / f"{name}.cfg"))
        game.set_available_buttons([getattr(doom.Button, name) for name in DOOM_BUTTONS])
        game.set_screen_resolution(doom.ScreenResolution.RES_160X120)
        game.set_screen_format(doom.ScreenFormat.RGB24)
        game.set_window_visible(False)
        game.set_mode(doom.Mode.PLAYER)
        game.set_render_hud(hud)
        # The engine leaves its settings in the folder it starts in.
        with contextlib.chdir(self._folder.name):
            game.set_doom_config_path(f"{self._folder.name}/vizdoom.ini")
            game.init()
        return game

    def reset(self, seed: int) -> None:
        """Starts an episode in both."""
        for game in self._games.values():
            game.set_seed(seed)
            game.new_episode()

    def frames(self) -> dict[str, U8]:
        """Returns what the player sees."""
        return {v: game.get_state().screen_buffer for v, game in self._games.items()}

    def state(self) -> list[float]:
        """Returns `DOOM_VARIABLES`."""
        values = [[g.get_game_variable(of) for of in self._of] for g in self._games.values()]
        assert values[0] == values[1], "the two games have parted"
        return values[0]

    def act(self, action: int) -> bool:
        """Holds an action for two tics."""
        for game in self._games.values():
            game.make_action([float(button) for button in self.actions[action]], 2)
        return not any(game.is_episode_finished() for game in self._games.values())

    def close(self) -> None:
        """Ends both engines."""
        for game in self._games.values():
            game.close()
        self._folder.cleanup()


def require(module: str) -> Any:
    """Imports a game engine.

    Raises:
        FetchError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = 'pip install -e ".[games]" -c constraints.txt'
        raise FetchError(f"gameplay needs the extra `games`: {install} ({error})") from error


@dataclass(frozen=True)
class Episode:
    """The files of one episode, and its seed."""

    out: Path
    game: str
    policy: str
    seed: int
    number: int

    def path(self, variant: str, suffix: str) -> Path:
        """Returns the path of one of its files."""
        name = f"{self.policy}-{self.seed:03d}-{self.number:03d}{suffix}"
        return self.out / variant / self.game / name

    def frames_there(self) -> int:
        """Returns the number of frames of an episode that exists and is whole, else 0."""
        suffixes = (".mp4", ".actions.npy", ".states.npy")
        files = [self.path(variant, suffix) for variant in VARIANTS for suffix in suffixes]
        return len(np.load(files[2])) if all(file.exists() for file in files) else 0


def record_games(
    out: Path, minutes: float, seed: int, games: Sequence[str], side: int | None = None
) -> float:
    """Records `minutes` of footage of each variant, equally long for every game and policy.

    Args:
        out: folder for the files.
        minutes: length of each variant. Episodes end at `LONGEST_EPISODE` and when the time of
        their
            game and policy is used up.
        seed: seed of games and policies.
        games: names from `GAMES`.
        side: squeeze the whole screen into a square of so many pixels; None keeps its size.

    Returns:
        Seconds of footage in the folder.

    Raises:
        FetchError: the engines are not installed.
        ValueError: an unknown game, or a side that video cannot have.
    """
    if side is not None and (side < 16 or side % 2):
        raise ValueError(f"--side: must be even and at least 16, got {side}")
    unknown = sorted(set(games) - set(GAMES))
    if unknown or not games:
        raise ValueError(f"--games: unknown {unknown}; there are {', '.join(GAMES)}")
    share, seconds = Fraction(minutes) * 60 / (len(games) * len(POLICIES)), 0.0
    columns = {}
    for name in track(games, description="recording"):
        game: Game = AtariGame(name) if name in ATARI_HUD else DoomGame(name)
        about = {"fps": float(game.rate), "actions": game.buttons, "states": game.variables}
        columns[name] = about
        for policy in POLICIES:
            left, number = share, 0
            while left > 0:
                episode = Episode(out, name, policy, seed, number)
                longest = ceil(min(left, Fraction(LONGEST_EPISODE)) * game.rate)
                frames = episode.frames_there() or play(game, episode, longest, side)
                length = frames / game.rate
                left, seconds, number = left - length, seconds + float(length), number + 1
        game.close()
    (out / "columns.json").write_text(json.dumps(columns, indent=1))
    return seconds


def play(game: Game, episode: Episode, longest: int, side: int | None = None) -> int:
    """Plays and records one episode of at most `longest` frames; returns how many it has."""
    rng = np.random.default_rng(
        [episode.seed, episode.number, GAMES.index(episode.game), POLICIES.index(episode.policy)]
    )
    game.reset(int(rng.integers(2**31)))
    writers = {v: Mp4Writer(episode.path(v, ".mp4"), game.rate) for v in VARIANTS}
    actions: list[tuple[int, ...]] = []
    states: list[list[float]] = []
    action = int(rng.integers(len(game.actions)))
    goes_on = True
    while goes_on and len(states) < longest:
        for variant, pixels in game.frames().items():
            writers[variant].add(pixels if side is None else squeeze(pixels, side))
        states.append(game.state())
        actions.append(game.actions[action])
        goes_on = game.act(action)
        action = next_action(episode.policy, action, len(states), len(game.actions), rng)
    for variant in VARIANTS:
        save_array(episode.path(variant, ".actions.npy"), np.array(actions, np.float32))
        save_array(episode.path(variant, ".states.npy"), np.array(states, np.float32))
        writers[variant].close()
    return len(states)


def squeeze(pixels_HW3: U8, side: int) -> U8:
    """Squeezes a picture into [side, side, 3]; each pixel is the mean of those it covers."""
    return np.asarray(Image.fromarray(pixels_HW3).resize((side, side), Image.Resampling.BOX))


def next_action(policy: str, last: int, step: int, count: int, rng: np.random.Generator) -> int:
    """Returns the number of the action to take: at random but sticky, or each in turn."""
    if policy == "scripted":
        return last if step % HOLD else (last + 1) % count
    return last if rng.random() < STICKY else int(rng.integers(count))
