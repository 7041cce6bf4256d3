"""Success rates with bootstrap intervals, and the gate that a world model has to pass.

Shape suffixes: B episodes, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
"""R, resamples of the bootstrap."""
SAME_ROOM, TIMES_RANDOM, OF_ORACLE, OPEN_LOOP_PX = 0.6, 5.0, 0.5, 1.5
"""The gate's thresholds."""

Bools = npt.NDArray[np.bool_]


def interval(values_B: npt.NDArray[Any], seed: int = 0) -> tuple[float, float]:
    """Returns the 95% interval of a mean, by resampling episodes with replacement."""
    drawn_RB = np.random.default_rng(seed).integers(len(values_B), size=(RESAMPLES, len(values_B)))
    means_R = np.asarray(values_B, np.float64)[drawn_RB].mean(1)
    low, high = np.quantile(means_R, [0.025, 0.975])
    return float(low), float(high)


def summary(reached: Mapping[str, Mapping[str, Bools]]) -> dict[str, Any]:
    """Returns rate and interval by row and kind, and what the critic adds, paired by episode."""
    rows = {
        row: {
            kind: {"rate": float(of_B.mean()), "interval": interval(of_B), "episodes": len(of_B)}
            for kind, of_B in kinds.items()
        }
        for row, kinds in reached.items()
    }
    lift = {
        kind: of_B.astype(np.float64) - reached["ours"][kind]
        for kind, of_B in reached["ours_critic"].items()
    }
    critic = {
        kind: {"lift": float(of_B.mean()), "interval": interval(of_B)}
        for kind, of_B in lift.items()
    }
    return {"rows": rows, "critic": critic}


def gate(rows: Mapping[str, Any], open_loop_px: float) -> dict[str, bool]:
    """Returns which conditions hold; those of a control only where there is one."""

    def rate(row: str, kind: str) -> float:
        return float(rows[row][kind]["rate"])

    # No better than random: their intervals meet, or the rate is below.
    not_better = rows["shuffled"]["same"]["interval"][0] <= rows["random"]["same"]["interval"][1]
    found = {
        "same_room_at_least_60%": rate("ours", "same") >= SAME_ROOM,
        "same_room_5x_random": rate("ours", "same") >= TIMES_RANDOM * rate("random", "same"),
        "cross_room_half_of_oracle": rate("ours", "cross")
        >= OF_ORACLE * rate("oracle_cem", "cross"),
        "cross_room_half_of_oracle_with_critic": rate("ours_critic", "cross")
        >= OF_ORACLE * rate("oracle_cem", "cross"),
        "shuffled_no_better_than_random": not_better,
        "open_loop_5_below_1.5_px": open_loop_px < OPEN_LOOP_PX,
    }
    if "control" in rows:
        found["control_fails"] = rate("control", "same") < SAME_ROOM
    return found
