"""A sweep over hyperparameters of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.config.checks import require
from pipelines.config.places import WrittenPlace


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which runs of a recipe are made, and which of them are stopped early; no label is needed."""

    space: tuple[str, ...] = ()
    """What varies: `optim.lr=log:1e-4:1e-2`, `views.colour=uniform:0:1`, or a list of choices,
    `objective.sigreg_weight=0.005,0.02,0.08`; several of them with spaces between. A choice of several
    numbers is written `(0.9,0.95)`."""
    samples: int | None = None
    """Runs, drawn at random; None makes all combinations, which takes lists of choices only."""
    seed: int = 0
    """Seed of the draw. Every run has the recipe's --run.seed."""
    concurrent: int = 1
    """Runs at a time, each with the recipe's workers, CPUs and GPUs."""
    metric: Literal["rankme", "lidar", "none"] = "rankme"
    """By what runs are stopped early (ASHA), read on fixed training samples at every checkpoint; `none`
    lets all of them end."""
    reduction: float = 3.0
    """Of the runs that get to a rung, one in so many goes on; rungs are the first checkpoint, so many
    times that, and so on."""
    out: WrittenPlace = "sweep"
    """Folder or `s3://` prefix of the runs, the results and the plot; the same again goes on with what is
    missing."""

    def __post_init__(self) -> None:
        require(self.samples is None or self.samples > 0, "samples", "must be positive")
        require(self.concurrent > 0, "concurrent", "must be positive")
        require(self.reduction > 1, "reduction", "must be above 1")
