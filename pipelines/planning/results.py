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


def rates(succeeded: Mapping[str, Mapping[str, Bools]]) -> dict[str, Any]:
    """Returns rate, interval and number of episodes by row and kind."""
    return {
        row: {
            kind: {"rate": float(of_B.mean()), "interval": interval(of_B), "episodes": len(of_B)}
            for kind, of_B in kinds.items()
        }
        for row, kinds in succeeded.items()
    }


def lifts(of: Mapping[str, Bools], beside: Mapping[str, Bools]) -> dict[str, Any]:
    """Returns by kind how much more often one row succeeds than another, paired by episode."""
    more = {kind: of_B.astype(np.float64) - beside[kind] for kind, of_B in of.items()}
    return {
        kind: {"lift": float(of_B.mean()), "interval": interval(of_B)}
        for kind, of_B in more.items()
    }


def summary(reached: Mapping[str, Mapping[str, Bools]]) -> dict[str, Any]:
    """Returns the rates of the comparison, and what the critic and slow features add."""
    found = {"rows": rates(reached), "critic": lifts(reached["ours_critic"], reached["ours"])}
    if "ours_plain" in reached:
        found["slow_features"] = lifts(reached["ours"], reached["ours_plain"])
    return found


def share_of(of_B: Bools, whole_B: Bools, seed: int = 0) -> dict[str, Any]:
    """Returns what share of one row's success another reaches, with a paired bootstrap interval."""
    drawn_RB = np.random.default_rng(seed).integers(len(of_B), size=(RESAMPLES, len(of_B)))
    shares_R = of_B[drawn_RB].mean(1) / np.maximum(whole_B[drawn_RB].mean(1), 1 / len(of_B))
    low, high = np.quantile(shares_R, [0.025, 0.975])
    whole = max(float(whole_B.mean()), 1 / len(of_B))
    return {"share": float(of_B.mean()) / whole, "interval": (float(low), float(high))}


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
