"""Settings of a sweep over hyperparameters of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.config.checks import require
from pipelines.config.places import WrittenPlace


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Which runs of a recipe are made, and which of them are stopped early. No labels are
    needed."""

    space: tuple[str, ...] = ()
    """What varies: `optim.lr=log:1e-4:1e-2`, `views.colour=uniform:0:1`, or a list of choices,
    `objective.sigreg_weight=0.005,0.02,0.08`; separate several with
    spaces. A choice of several numbers is written `(0.9,0.95)`."""
    samples: int | None = None
    """Number of runs, drawn at random. None makes all combinations and needs lists of choices."""
    seed: int = 0
    """Seed of the draw. Every run has the recipe's --run.seed."""
    concurrent: int = 1
    """Number of runs at a time, each with the recipe's workers, CPUs and GPUs."""
    metric: Literal["rankme", "lidar", "none"] = "rankme"
    """Metric by which runs are stopped early (ASHA), read on fixed training samples at every
    checkpoint; `none` lets all runs finish."""
    reduction: float = 3.0
    """One in this many runs continues past each rung. The first rung is the first checkpoint, and
    each further one is this many times as late."""
    out: WrittenPlace = "sweep"
    """Folder or `s3://` prefix of the runs, the results and the plot. With the same folder again,
    the sweep makes only the missing runs."""

    def __post_init__(self) -> None:
        require(self.samples is None or self.samples > 0, "samples", "must be positive")
        require(self.concurrent > 0, "concurrent", "must be positive")
        require(self.reduction > 1, "reduction", "must be above 1")
