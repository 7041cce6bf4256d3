"""Which patches touch no region, against a count of pixels one by one."""

from __future__ import annotations

import numpy as np
import pytest

from models.media.regions import check_region, kept_patches

SIDE = 240
"""Pixels of the picture's height and width; regions and patches below end at whole pixels."""


def counted(regions, box, grid, flipped) -> np.ndarray:
    """Paints the regions into the picture, cuts the box out pixel by pixel, and looks for paint."""
    margin = 2 * SIDE
    plane = np.zeros((SIDE + 2 * margin, SIDE + 2 * margin), bool)
    for left, top, right, bottom in (np.rint(np.array(r) * SIDE).astype(int) for r in regions):
        plane[margin + top : margin + bottom, margin + left : margin + right] = True
    left, top, right, bottom = (side + margin for side in box)
    shown = plane[top:bottom, left:right]
    shown = shown[:, ::-1] if flipped else shown
    rows, columns = grid
    high, wide = shown.shape[0] // rows, shown.shape[1] // columns
    assert (high * rows, wide * columns) == shown.shape
    return ~shown.reshape(rows, high, columns, wide).any((1, 3)).reshape(-1)


def test_kept_patches_are_those_without_a_pixel_of_a_region() -> None:
    drawn = np.random.default_rng(0)
    most, boxes, grids, flips, expected, regions = 40, [], [], [], [], []
    for _ in range(6):  # regions are common to a call
        corners = np.sort(drawn.integers(0, SIDE + 1, (2, 2, 2)), axis=1).astype(float) / SIDE
        found = [(a[0], a[1], b[0], b[1]) for a, b in corners if (b > a).all()]
        regions.append(tuple(tuple(float(side) for side in region) for region in found))
    for chosen in regions:
        boxes, grids, flips, expected = [], [], [], []
        for _ in range(60):
            rows, columns = int(drawn.integers(1, 6)), int(drawn.integers(1, 8))
            left, top = drawn.integers(-60, 120, 2).tolist()  # some reach outside, as with `pad`
            wide, high = columns * int(drawn.integers(1, 40)), rows * int(drawn.integers(1, 40))
            boxes.append((left, top, left + wide, top + high))
            grids.append((rows, columns))
            flips.append(bool(drawn.integers(2)))
            mine = counted(chosen, boxes[-1], grids[-1], flips[-1])
            expected.append(np.pad(mine, (0, most - len(mine))))
        sizes = np.full((60, 2), SIDE)
        kept = kept_patches(chosen, sizes, boxes, grids, most, np.array(flips))
        np.testing.assert_array_equal(kept, np.stack(expected))


def test_height_and_width_of_the_picture_are_not_mixed_up() -> None:
    """The left half of a picture of 100 x 400 pixels, on a grid of 2 x 4."""
    kept = kept_patches(((0, 0, 0.5, 1),), [(100, 400)], [(0, 0, 400, 100)], [(2, 4)], 8)
    assert kept.reshape(2, 4).tolist() == [[False, False, True, True]] * 2


def test_a_region_that_ends_where_a_patch_begins_leaves_it() -> None:
    for size in (300, 1000, 1279):  # a third is no exact number of pixels
        box = [(0, 0, size, size)]
        kept = kept_patches(((0, 0, 1 / 3, 1),), [(size, size)], box, [(3, 3)], 9)
        assert kept.reshape(3, 3)[0].tolist() == [False, True, True]
        kept = kept_patches(((0, 0, 1 / 3 + 1e-3, 1),), [(size, size)], box, [(3, 3)], 9)
        assert kept.reshape(3, 3)[0].tolist() == [False, False, True]


@pytest.mark.parametrize(
    "region",
    [(0.5, 0, 0.5, 1), (0.6, 0, 0.5, 1), (0, 0, 1.1, 1), (-0.1, 0, 1, 1), (0, 0.5, 1, 0.2)],
)
def test_a_region_must_lie_inside_the_picture(region: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="is not LEFT,TOP,RIGHT,BOTTOM"):
        check_region(region)
