"""Records games as labelled video: Atari 2600 (ale-py) and Doom (vizdoom, with Freedoom's art).

    pip install -e ".[games]" -c constraints.txt
    python -m pipelines.fetch gameplay --out data/gameplay --minutes 30

    OUT/<variant>/<game>/<policy>-<seed>-<episode>
        .mp4            the same episode in every variant
        .actions.npy    float32 [frames, buttons], 0 or 1
        .states.npy     float32 [frames, variables]
    OUT/columns.json    the names of the columns, by game

Row t holds the state that frame t shows and the action taken in it. The variants are `hud` (as the
game is), `nohud` (Doom drawn anew, Atari's score and lives painted black), and `hud_b` and `hud_c`
(the footage of `nohud` with another HUD drawn over it). The same seed gives the same files; an
episode that is there already is not played again.

`--side 84` squeezes the whole screen into a square of 84 pixels, as agents that play these games
see it (Mnih et al. 2015). `--size 144x256` records in another aspect: Doom's engine draws it, and
Atari's square stands in the middle of the frame, with room for panels beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import track

from pipelines.fetchers.games import atari, doom
from pipelines.fetchers.games.atari import AtariGame
from pipelines.fetchers.games.doom import DoomGame
from pipelines.fetchers.games.engine import U8, Game
from pipelines.fetchers.games.frame_size import broadcast, resize
from pipelines.fetchers.games.hud_b import draw_hud_b
from pipelines.fetchers.games.hud_c import draw_hud_c
from pipelines.fetchers.games.hud_values import HudTracker, HudValues
from pipelines.ingestion.preparing.mp4 import Mp4Writer, save_array

GAMES = (*atari.HUD_ROWS, *doom.SCENARIOS)
POLICIES = ("random", "scripted")
Variant = Literal["hud", "nohud", "hud_b", "hud_c"]
GAME_VARIANTS: tuple[Variant, ...] = ("hud", "nohud")
"""What the games draw themselves."""
DRAWN: dict[Variant, Callable[[U8, HudValues], U8]] = {"hud_b": draw_hud_b, "hud_c": draw_hud_c}
"""What is drawn over the frame without HUD."""
SUFFIXES = (".mp4", ".actions.npy", ".states.npy")
LONGEST_EPISODE = 60  # seconds
STICKY = 0.9  # chance that the random policy does the same again
HOLD = 12  # frames for which the scripted policy holds an action


@dataclass(frozen=True, kw_only=True)
class Footage:
    """How frames look.

    Attributes:
        variants: which are written.
        size: height and width of frames. None keeps what the game draws.
        squeeze: the whole screen fills `size`, whatever its aspect.
    """

    variants: tuple[Variant, ...] = GAME_VARIANTS
    size: tuple[int, int] | None = None
    squeeze: bool = False

    def start(self, name: str) -> Game:
        """Starts a game."""
        if name in atari.HUD_ROWS:
            return AtariGame(name)
        return DoomGame(name, "hud" in self.variants, None if self.squeeze else self.size)

    def fit(self, name: str, pixels_HW3: U8) -> U8:
        """Returns a game's picture in the size of frames."""
        if self.size is None:
            return pixels_HW3
        if self.squeeze or name in doom.SCENARIOS:
            return resize(pixels_HW3, *self.size)
        return broadcast(pixels_HW3, *self.size)


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

    def frames_there(self, variants: Sequence[Variant], columns: int) -> int:
        """Returns the number of frames of an episode that exists and is whole, else 0.

        It is not whole if it was recorded when states had fewer columns.
        """
        files = [self.path(variant, suffix) for variant in variants for suffix in SUFFIXES]
        if not all(file.exists() for file in files):
            return 0
        shapes = {np.load(self.path(variant, ".states.npy")).shape for variant in variants}
        frames, found = shapes.pop()
        return frames if not shapes and found == columns else 0


def record_games(
    out: Path,
    minutes: float,
    seed: int,
    games: Sequence[str],
    footage: Footage = Footage(),
) -> float:
    """Records `minutes` of footage of each variant, equally long for every game and policy.

    Args:
        out: folder for the files.
        minutes: length of each variant. Episodes end at `LONGEST_EPISODE` and when the time of
            their game and policy is used up.
        seed: seed of games and policies.
        games: names from `GAMES`.
        footage: variants and size of the frames.

    Returns:
        Seconds of footage in the folder.

    Raises:
        FetchError: the engines are not installed.
        ValueError: an unknown game.
    """
    unknown = sorted(set(games) - set(GAMES))
    if unknown or not games:
        raise ValueError(f"--games: unknown {unknown}; there are {', '.join(GAMES)}")
    share, seconds = Fraction(minutes) * 60 / (len(games) * len(POLICIES)), 0.0
    columns = {}
    for name in track(games, description="recording"):
        game = footage.start(name)
        about = {"fps": float(game.rate), "actions": game.buttons, "states": game.variables}
        columns[name] = about
        for policy in POLICIES:
            left, number = share, 0
            while left > 0:
                episode = Episode(out, name, policy, seed, number)
                longest = ceil(min(left, Fraction(LONGEST_EPISODE)) * game.rate)
                there = episode.frames_there(footage.variants, len(game.variables))
                frames = there or play(game, episode, longest, footage)
                length = frames / game.rate
                left, seconds, number = left - length, seconds + float(length), number + 1
        game.close()
    (out / "columns.json").write_text(json.dumps(columns, indent=1))
    return seconds


def play(game: Game, episode: Episode, longest: int, footage: Footage) -> int:
    """Plays and records one episode of at most `longest` frames; returns how many it has."""
    rng = np.random.default_rng(
        [episode.seed, episode.number, GAMES.index(episode.game), POLICIES.index(episode.policy)]
    )
    game.reset(int(rng.integers(2**31)))
    writers = {v: Mp4Writer(episode.path(v, ".mp4"), game.rate) for v in footage.variants}
    tracker = HudTracker(game.variables, game.rate)
    actions: list[tuple[int, ...]] = []
    states: list[list[float]] = []
    action = int(rng.integers(len(game.actions)))
    goes_on = True
    while goes_on and len(states) < longest:
        states.append(game.state())
        values = tracker.update(states[-1])
        shown = {v: footage.fit(episode.game, pixels) for v, pixels in game.frames().items()}
        for variant, writer in writers.items():
            draw = DRAWN.get(variant)
            writer.add(draw(shown["nohud"], values) if draw else shown[variant])
        actions.append(game.actions[action])
        goes_on = game.act(action)
        action = next_action(episode.policy, action, len(states), len(game.actions), rng)
    for variant, writer in writers.items():
        save_array(episode.path(variant, ".actions.npy"), np.array(actions, np.float32))
        save_array(episode.path(variant, ".states.npy"), np.array(states, np.float32))
        writer.close()
    return len(states)


def next_action(policy: str, last: int, step: int, count: int, rng: np.random.Generator) -> int:
    """Returns the number of the action to take: at random but sticky, or each in turn."""
    if policy == "scripted":
        return last if step % HOLD else (last + 1) % count
    return last if rng.random() < STICKY else int(rng.integers(count))
