"""Counts and distances of what a frame of Doom shows, from ViZDoom's labels and depth buffer.

Shape suffixes: H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, nan
from typing import Any

import numpy as np

VIEW_VARIABLES = ("objects_in_view", "nearest_distance", "depth_ahead")
"""Columns of what is in view.

`objects_in_view` counts monsters and items of which at least `LEAST_SHARE` of the picture shows.
`nearest_distance` is how far the nearest of them stands from the player, in map units on the floor
(the player is 32 wide and 56 high); NaN where none is in view. `depth_ahead` is the median of the
depth buffer in the middle fifth of height and width, without the player's own weapon. It is in the
buffer's levels, one level being about 7.5 map units along the line of sight; walls farther than
about 560 units all have level 76. It is NaN where the weapon covers the middle.
"""
LEAST_SHARE = 2e-4
"""Smallest share of the picture that counts as seen: 4 pixels of 160 x 120, 7 of 256 x 144."""
EFFECTS = ("BulletPuff", "Blood")
"""Names of labelled objects that are traces of a shot."""


def view_values(state: Any, at: Sequence[float]) -> list[float]:
    """Returns `VIEW_VARIABLES` of a ViZDoom state, the player standing at x and y."""
    labels_HW, depth_HW = state.labels_buffer, state.depth_buffer
    pixels = np.bincount(labels_HW.ravel(), minlength=256)
    shown = [label for label in state.labels if pixels[label.value] >= LEAST_SHARE * labels_HW.size]
    objects = [o for o in shown if o.object_category != "Self" and o.object_name not in EFFECTS]
    distances = [
        hypot(thing.object_position_x - at[0], thing.object_position_y - at[1]) for thing in objects
    ]
    own = [label.value for label in state.labels if label.object_category == "Self"]
    height, width = depth_HW.shape
    middle = np.s_[2 * height // 5 : 3 * height // 5, 2 * width // 5 : 3 * width // 5]
    ahead = depth_HW[middle][~np.isin(labels_HW[middle], own)]
    return [
        float(len(objects)),
        min(distances, default=nan),
        float(np.median(ahead)) if ahead.size else nan,
    ]
