"""What the table is made of: footage, tasks, sizes of the networks, and where results are."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.media.regions import Region
from pipelines.config.train import ModelConfig
from pipelines.recipes.registry import RECIPES

RECIPE = "levjepa_gameplay"
OLD = "hud"
"""The variant with labels: A, the game's own HUD."""
NEW = ("nohud", "hud_b", "hud_c")
"""The variants without labels."""
SHOWN = {"hud": "A", "nohud": "none", "hud_b": "B", "hud_c": "C"}
"""Variants as the table calls them."""
OTHER_GAME = "other"
"""Folder of the footage of a game that no task is about, for the control."""

Family = Literal["doom", "atari"]
"""Games with the same HUD."""
_DOOM_BAR: Region = (0.0, 0.8334, 1.0, 1.0)
_ATARI_SCORE: Region = (0.22, 0.0, 0.78, 0.11)
HIDDEN: dict[tuple[Family, str], tuple[Region, ...]] = {
    ("doom", "nohud"): (_DOOM_BAR,),
    ("doom", "hud_b"): (_DOOM_BAR, (0.0, 0.0, 0.16, 1.0), (0.78, 0.0, 1.0, 0.36)),
    ("doom", "hud_c"): (
        *(_DOOM_BAR, (0.0, 0.0, 0.2, 0.36), (0.0, 0.65, 0.2, 1.0)),
        *((0.78, 0.0, 1.0, 0.6), (0.78, 0.8334, 1.0, 1.0)),
    ),
    ("atari", "nohud"): (_ATARI_SCORE,),
    ("atari", "hud_b"): (_ATARI_SCORE, (0.0, 0.0, 0.16, 1.0)),
    ("atari", "hud_c"): (
        *(_ATARI_SCORE, (0.0, 0.65, 0.2, 1.0)),
        *((0.8, 0.0, 1.0, 0.6), (0.8, 0.8334, 1.0, 1.0)),
    ),
}
"""Where A or a new HUD is, as somebody who looks at one frame of each would say."""
EVERYWHERE: tuple[Region, ...] = (
    _DOOM_BAR,
    _ATARI_SCORE,
    (0.0, 0.0, 0.2, 1.0),
    (0.78, 0.0, 1.0, 1.0),
)
"""Where any of the HUDs is."""

Kind = Literal["states", "counts", "distances"]
KINDS: tuple[Kind, ...] = ("states", "counts", "distances")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A column of the games' states that probes predict."""

    game: str
    column: str
    kind: Kind
    title: str
    flips: bool = False
    """Whether a picture may be mirrored without changing the label."""

    @property
    def name(self) -> str:
        """Key of the task in results."""
        return f"{self.game}-{self.column}"


def family_of(game: str) -> Family:
    """Returns whose HUD a game has."""
    return "atari" if game in ("pong", "ms_pacman", "seaquest") else "doom"


TASKS = (
    Task(game="my_way_home", column="POSITION_X", kind="states", title="place, x"),
    Task(game="my_way_home", column="ANGLE", kind="states", title="direction of view"),
    Task(game="pong", column="ram_51", kind="states", title="height of the paddle", flips=True),
    Task(game="ms_pacman", column="ram_10", kind="states", title="her column"),
    Task(
        game="health_gathering",
        column="objects_in_view",
        kind="counts",
        title="objects in view",
        flips=True,
    ),
    Task(
        game="deadly_corridor",
        column="objects_in_view",
        kind="counts",
        title="objects in view",
        flips=True,
    ),
    Task(
        game="health_gathering",
        column="nearest_distance",
        kind="distances",
        title="distance of the nearest",
        flips=True,
    ),
    Task(
        game="defend_the_center",
        column="nearest_distance",
        kind="distances",
        title="distance of the nearest",
        flips=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a result is; a work folder belongs to one of them."""

    work: Path
    """Folder of shards, runs and results."""
    footage: Path
    """Folder with `train/VARIANT`, `test/VARIANT`, `new/VARIANT` (unlabelled footage of the new
    HUDs, other episodes), `other/hud` (another game), and `train/columns.json`."""
    size: tuple[int, int] = (48, 80)
    """Height and width of the encoder's input, pixels."""
    encoder: str = "video_micro"
    steps: int = 600
    """Steps of pretraining. Adapting takes a quarter of them, as `pipelines.adapt` does."""
    batch: int = 64
    """Clips in a step of pretraining."""
    labels: tuple[int, ...] = (10, 50, 300)
    """Labelled clips of each of the four classes; the last is all that there are."""
    supervised_steps: tuple[int, ...] = (100, 200, 600)
    """Steps of 32 clips of supervised training, for each of `labels`."""
    train_clips: int = 4
    """Labelled clips of each segment of two seconds."""
    test_clips: int = 2
    """Scored clips of each segment."""
    prefix: tuple[str, ...] = ("nice", "-n", "10")
    """What the commands that ingest and train are started with."""

    @classmethod
    def quick(cls, work: Path, footage: Path, prefix: tuple[str, ...]) -> Settings:
        """Settings that run through everything in minutes; their results mean nothing."""
        return cls(
            work=work,
            footage=footage,
            prefix=prefix,
            steps=8,
            batch=16,
            labels=(10, 30),
            supervised_steps=(2, 2),
            train_clips=1,
            test_clips=1,
        )

    def clips_of(self, name: str) -> int:
        """Returns how many clips of a segment are read of a set; one where there are no labels."""
        if name.startswith("new/"):
            return 1
        return self.train_clips if name == f"train/{OLD}" else self.test_clips

    def as_json(self) -> dict[str, object]:
        """What results depend on, without the folders."""
        values = dataclasses.asdict(self)
        return {k: v for k, v in values.items() if k not in ("work", "footage", "prefix")}


def model(cfg: Settings) -> ModelConfig:
    """Returns the settings of the encoder: the recipe's, with the benchmark's size."""
    base = RECIPES[RECIPE][1].model
    return dataclasses.replace(base, image_size=cfg.size, encoder=cfg.encoder, fit="squash")
