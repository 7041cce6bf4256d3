"""Finds test frames that nearly equal a training frame, so that they can be left out of a test.

Games begin every episode at the same place and have few rooms, so other episodes still show some of
the training set's pictures again, and a probe that remembers them reads more than it learned. Two
frames are near duplicates if no cell of their grey thumbnails differs by more than a threshold. A
mean of the differences would overlook a ball or a paddle that has moved.

A HUD must not decide, because its numbers differ between frames of the same scene: give the frames
of the recording without HUD, or leave the HUD's regions out.

`pipelines.evaluate --near-duplicates` compares what the encoder is shown.

Shape suffixes: N frames, H height, W width, P cells (patches) of a thumbnail, V values of a state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial.distance import cdist
from torch.nn.functional import adaptive_avg_pool2d

from models.media.regions import Region, kept_patches

THUMBNAIL = (18, 32)
"""Height and width of a thumbnail in cells."""
THRESHOLD = 4.0
"""Largest difference of a cell's mean grey, of 255 levels, between near duplicates.

In games recorded at 72 x 128 without HUD (Doom, Pong, Ms. Pac-Man), pairs below it showed the same
state: the same place and direction, paddle and ball. Pairs between 4 and 8 no longer did.
"""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Shares of red, green and blue in grey (ITU-R BT.601)."""
CHUNK = 2**24
"""Entries of the matrix of distances that are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class NearDuplicates:
    """Which test frames nearly equal a training frame.

    Attributes:
        distance_N: float32 [N], for each test frame the difference to the nearest training frame,
            in grey levels of the cell that differs most.
        nearest_N: int64 [N], the index of that training frame.
        threshold: the largest difference of near duplicates.
    """

    distance_N: npt.NDArray[np.float32]
    nearest_N: npt.NDArray[np.int64]
    threshold: float

    @property
    def kept_N(self) -> npt.NDArray[np.bool_]:
        """True for each test frame that is no near duplicate, bool [N]."""
        return self.distance_N > self.threshold

    def report(self) -> dict[str, float]:
        """Returns counts for results.json: how many were tested, and how many left out."""
        removed = int((~self.kept_N).sum())
        return {
            "test": len(self.distance_N),
            "removed": removed,
            "share": removed / len(self.distance_N),
            "threshold": self.threshold,
            "median_distance": float(np.median(self.distance_N)),
        }


def near_duplicate_notes(data: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Says in whole sentences how many samples of each set were left out as near duplicates.

    Args:
        data: `data` of results.json.
    """
    return [
        f"--{name.replace('_', '-')}: {counts['removed']:,} of {counts['test']:,} samples "
        f"({100 * counts['share']:.1f}%) are left out, because no part of their picture differs by "
        f"more than {counts['threshold']:g} of 255 levels from a sample of --data"
        for name, found in data.items()
        if (counts := found.get("near_duplicates")) is not None
    ]


def find_near_duplicates(
    train_NHW3: npt.NDArray[np.uint8],
    test_NHW3: npt.NDArray[np.uint8],
    *,
    threshold: float = THRESHOLD,
    exclude: Sequence[Region] = (),
) -> NearDuplicates:
    """Compares every test frame with every training frame.

    Args:
        train_NHW3: RGB frames [N, H, W, 3] of the training set.
        test_NHW3: RGB frames of the test set, of any size and number.
        threshold: largest difference of near duplicates, in grey levels from 0 to 255.
        exclude: regions that do not count, such as those of a HUD.

    Raises:
        ValueError: there are no frames, or `exclude` leaves nothing of them.
    """
    if not len(train_NHW3) or not len(test_NHW3):
        raise ValueError("near duplicates: there are no frames to compare")
    return compare_thumbnails(
        thumbnails(train_NHW3, exclude), thumbnails(test_NHW3, exclude), threshold
    )


def compare_thumbnails(
    train_NP: npt.NDArray[np.float32], test_NP: npt.NDArray[np.float32], threshold: float
) -> NearDuplicates:
    """Compares every thumbnail of a test frame with every one of a training frame."""
    step = max(1, CHUNK // len(train_NP))
    distances, nearest = [], []
    for start in range(0, len(test_NP), step):
        matrix = cdist(test_NP[start : start + step], train_NP, "chebyshev")
        distances.append(matrix.min(axis=1))
        nearest.append(matrix.argmin(axis=1))
    return NearDuplicates(
        distance_N=np.concatenate(distances).astype(np.float32),
        nearest_N=np.concatenate(nearest).astype(np.int64),
        threshold=threshold,
    )


def thumbnails(
    frames_NHW3: npt.NDArray[np.uint8], exclude: Sequence[Region] = ()
) -> npt.NDArray[np.float32]:
    """Returns the mean grey of each cell that no excluded region touches, float32 [N, P].

    Raises:
        ValueError: `exclude` leaves no cell.
    """
    cells_NHW = adaptive_avg_pool2d(torch.from_numpy(frames_NHW3 @ LUMA), THUMBNAIL)
    size, cells = frames_NHW3.shape[1:3], THUMBNAIL[0] * THUMBNAIL[1]
    box = (0, 0, size[1], size[0])
    kept_P = kept_patches(tuple(exclude), [size], [box], [THUMBNAIL], cells)[0]
    if not kept_P.any():
        raise ValueError("exclude: the regions leave nothing of the frame")
    return cells_NHW.numpy().reshape(-1, cells)[:, kept_P]


def repeated_states(
    train_NV: npt.NDArray[np.float32], test_NV: npt.NDArray[np.float32]
) -> npt.NDArray[np.bool_]:
    """Returns for each test state whether it equals a training state in every value, bool [N].

    A NaN equals a NaN.
    """
    seen = {row.tobytes() for row in np.ascontiguousarray(train_NV)}
    return np.array([row.tobytes() in seen for row in np.ascontiguousarray(test_NV)], bool)
