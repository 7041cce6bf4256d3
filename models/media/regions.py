"""Regions of the picture that an encoder leaves out, such as a HUD.

Shape suffixes: B pictures, R regions, N tokens of one time step (of the largest grid),
4 = (left, top, right, bottom), 2 = (height, width) or (rows, columns).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Region = tuple[float, float, float, float]
"""Left, top, right and bottom of a rectangle, as fractions of the picture's width and height."""

Bools = npt.NDArray[np.bool_]

SLACK = 1e-6
"""Share of a token that a region may cover by rounding without leaving it out."""


def check_region(region: Region) -> Region:
    """Returns the region.

    Raises:
        ValueError: it is empty, or not inside the picture.
    """
    left, top, right, bottom = region
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError(
            f"region {','.join(f'{side:g}' for side in region)} is not LEFT,TOP,RIGHT,BOTTOM with "
            "0 <= LEFT < RIGHT <= 1 and 0 <= TOP < BOTTOM <= 1"
        )
    return region


def kept_patches(
    regions: tuple[Region, ...],
    sizes_B2: npt.ArrayLike,
    boxes_B4: npt.ArrayLike,
    grids_B2: npt.ArrayLike,
    most: int,
    flipped_B: Bools | None = None,
) -> Bools:
    """Returns which patches of one time step exist and touch no region.

    Args:
        regions: what is left out of every picture.
        sizes_B2: heights and widths of the pictures, pixels.
        boxes_B4: the box of each picture that its grid is stretched over, pixels.
        grids_B2: rows and columns of each grid.
        most: N; no grid has more patches.
        flipped_B: whether the grid shows its box mirrored left to right; None for never.

    Returns:
        bool [B, N]; patches in raster order of each one's own grid, the rest of a row is False.
    """
    grids = np.asarray(grids_B2, np.int64)
    rows_B1, columns_B1 = grids[:, :1], grids[:, 1:]
    number_N = np.arange(most)
    row_BN, column_BN = number_N // columns_B1, number_N % columns_B1
    kept_BN = row_BN < rows_B1
    if flipped_B is not None:
        column_BN = np.where(flipped_B[:, None], columns_B1 - 1 - column_BN, column_BN)
    sizes, boxes = np.asarray(sizes_B2, np.float64), np.asarray(boxes_B4, np.float64)
    left_B1, top_B1, right_B1, bottom_B1 = (boxes[:, i, None] for i in range(4))
    high_B1, wide_B1 = (bottom_B1 - top_B1) / rows_B1, (right_B1 - left_B1) / columns_B1
    for left, top, right, bottom in regions:
        across = _covered(left_B1, wide_B1, column_BN, sizes[:, 1:], left, right)
        down = _covered(top_B1, high_B1, row_BN, sizes[:, :1], top, bottom)
        kept_BN &= ~(across & down)
    return kept_BN


def _covered(
    start_B1: npt.NDArray[np.float64],
    step_B1: npt.NDArray[np.float64],
    index_BN: npt.NDArray[np.int64],
    side_B1: npt.NDArray[np.float64],
    low: float,
    high: float,
) -> Bools:
    """Whether a region's side [low, high], in fractions, covers part of each patch's side."""
    from_BN = start_B1 + index_BN * step_B1
    overlap_BN = np.minimum(high * side_B1, from_BN + step_B1) - np.maximum(low * side_B1, from_BN)
    covered: Bools = overlap_BN > SLACK * step_B1
    return covered
