"""What the input shows of a picture under each fit, and on which grid."""

from __future__ import annotations

import numpy as np
import pytest

from models.image_size import ImageSize, best_grid
from models.media.fit import Fit, aspects_differ, grids_of, lost_share, shown_boxes, stretch

WIDE: ImageSize = (144, 256)


@pytest.mark.parametrize(
    ("fit", "size", "picture", "box"),
    [
        ("crop", 224, (720, 1280), (280, 0, 1000, 720)),
        ("crop", 224, (1280, 720), (0, 280, 720, 1000)),
        ("crop", WIDE, (960, 1280), (0, 120, 1280, 840)),
        ("crop", WIDE, (360, 1280), (320, 0, 960, 360)),
        ("pad", 224, (720, 1280), (0, -280, 1280, 1000)),
        ("pad", 224, (1280, 720), (-280, 0, 1000, 1280)),
        ("pad", WIDE, (900, 1200), (-200, 0, 1400, 900)),
        ("squash", 224, (720, 1280), (0, 0, 1280, 720)),
        ("whole", WIDE, (1280, 720), (0, 0, 720, 1280)),
    ],
)
def test_boxes(fit: Fit, size: ImageSize, picture: tuple[int, int], box: tuple) -> None:
    np.testing.assert_allclose(shown_boxes(fit, [picture], size)[0], box, atol=1e-9)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash", "whole"])
def test_a_picture_of_the_inputs_aspect_is_shown_whole(fit: Fit) -> None:
    assert shown_boxes(fit, [(720, 1280)], WIDE)[0].tolist() == [0, 0, 1280, 720]


def test_grids_of_many_pictures_are_the_best_of_all_grids() -> None:
    sides = np.random.default_rng(0).integers(20, 2000, (60, 2))
    boxes = np.concatenate([np.zeros_like(sides), sides], axis=1)
    for size, tokens in ((224, 196), (WIDE, 144), (32, 4)):
        grids = grids_of("whole", boxes, size, 16)
        for (wide, high), (rows, columns) in zip(sides.tolist(), grids.tolist(), strict=True):
            assert (rows, columns) == best_grid(high, wide, tokens)
            assert 1 <= rows * columns <= tokens
            ratio = rows / columns / (high / wide)
            mine = rows * columns * min(ratio, 1 / ratio) ** 2
            for r in range(1, tokens + 1):
                c = min(tokens // r, max(1, round(r * wide / high)))
                other = r / c / (high / wide)
                assert r * c * min(other, 1 / other) ** 2 <= mine * (1 + 1e-9)
    assert grids_of("pad", boxes[:2], WIDE, 16).tolist() == [[9, 16]] * 2


def test_what_is_lost_and_stretched() -> None:
    assert lost_share("crop", 720, 1280, 224) == pytest.approx(1 - 720 / 1280)
    assert lost_share("pad", 720, 1280, 224) == 0
    assert stretch(720, 1280, 224) == pytest.approx(16 / 9)
    assert stretch(1280, 720, 224) == pytest.approx(16 / 9)
    assert not aspects_differ(720, 1280, WIDE)
    assert not aspects_differ(100, 104, 224)
    assert aspects_differ(100, 106, 224)
    assert aspects_differ(106, 100, 224)
