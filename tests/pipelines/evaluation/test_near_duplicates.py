"""Near duplicates between training and test frames."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation.near_duplicates import (
    find_near_duplicates,
    repeated_states,
    thumbnails,
)

TOP = (0.0, 0.0, 1.0, 0.25)


def scenes(count: int, seed: int) -> np.ndarray:
    """Random pictures [N, 72, 128, 3] of coarse blocks."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, 9, 16, 3), np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


def noisy(frames: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(9).normal(0, 3, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def test_a_noisy_copy_is_found_and_another_scene_is_not() -> None:
    train = scenes(40, seed=0)
    test = np.concatenate([noisy(train[[7, 31]]), scenes(5, seed=1)])
    found = find_near_duplicates(train, test)
    assert found.kept_N.tolist() == [False, False, True, True, True, True, True]
    assert found.nearest_N[:2].tolist() == [7, 31]
    report = found.report()
    assert (report["test"], report["removed"]) == (7, 2)
    assert report["share"] == pytest.approx(2 / 7)


def test_a_small_thing_that_moved_makes_another_frame() -> None:
    train = np.zeros((1, 72, 128, 3), np.uint8)
    test = train.copy()
    test[0, 40:42, 60:62] = 200  # a ball of 2 x 2 pixels
    difference = np.abs(test.astype(int) - train).mean()
    assert difference < 0.2  # the mean over the frame would overlook it
    assert find_near_duplicates(train, test).kept_N.all()
    assert not find_near_duplicates(train, test, threshold=255).kept_N.any()


def test_the_hud_does_not_decide() -> None:
    train = scenes(5, seed=2)
    test = noisy(train)
    test[:, :18] = scenes(5, seed=3)[:, :18]  # other numbers in a HUD at the top
    assert find_near_duplicates(train, test).kept_N.all()
    assert not find_near_duplicates(train, test, exclude=[TOP]).kept_N.any()


def test_many_test_frames_are_compared_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = scenes(30, seed=4), scenes(25, seed=5)
    test[13] = train[2]
    whole = find_near_duplicates(train, test)
    monkeypatch.setattr("pipelines.evaluation.near_duplicates.CHUNK", 100)
    parts = find_near_duplicates(train, test)
    np.testing.assert_array_equal(parts.distance_N, whole.distance_N)
    np.testing.assert_array_equal(parts.nearest_N, whole.nearest_N)
    assert np.flatnonzero(~parts.kept_N).tolist() == [13]


def test_cells_and_their_grey() -> None:
    frames = np.zeros((2, 36, 64, 3), np.uint8)
    frames[1, :2, :2] = (255, 0, 0)
    grey = thumbnails(frames)
    assert grey.shape == (2, 18 * 32)
    assert grey[1, 0] == pytest.approx(0.299 * 255)
    assert not grey[1, 1:].any()
    # The region covers 4.5 rows of cells, and a cell that it touches does not count.
    assert thumbnails(frames, [TOP]).shape == (2, (18 - 5) * 32)
    with pytest.raises(ValueError, match="leave nothing"):
        thumbnails(frames, [(0, 0, 1, 1)])
    with pytest.raises(ValueError, match="no frames"):
        find_near_duplicates(frames[:0], frames)


def test_repeated_states() -> None:
    train = np.array([[1, 2], [3, np.nan]], np.float32)
    test = np.array([[1, 2.5], [3, np.nan], [1, 2]], np.float32)
    assert repeated_states(train, test).tolist() == [False, True, True]
