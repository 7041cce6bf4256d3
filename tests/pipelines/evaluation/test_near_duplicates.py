"""Near duplicates between training and test frames."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from models.encoders.input_batch import InputBatch
from models.media.preprocessing import EncoderInput, Preprocessing
from pipelines.dataset.shards import Manifest
from pipelines.evaluation.features import thumbnail_features
from pipelines.evaluation.near_duplicates import (
    find_near_duplicates,
    near_duplicate_notes,
    repeated_states,
    thumbnails,
)
from pipelines.evaluation.probe_sets import ProbeSet, without_near_duplicates
from pipelines.evaluation.validity import facts_of

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


def prep(**settings: object) -> Preprocessing:
    return Preprocessing(
        image_size=(72, 128), mean=(0.5,) * 3, std=(0.25,) * 3, patch_size=8, **settings
    )


def test_thumbnails_of_what_the_encoder_is_shown() -> None:
    frames = noisy(scenes(6, seed=6))
    pictures = InputBatch.of([EncoderInput(frame) for frame in frames], prep())
    np.testing.assert_allclose(thumbnail_features(pictures).numpy(), thumbnails(frames), rtol=1e-4)
    clip = InputBatch.of([EncoderInput(frames[:4]), EncoderInput(frames[2:])], prep())
    np.testing.assert_allclose(
        thumbnail_features(clip).numpy(), thumbnails(frames[[2, 4]]), rtol=1e-4
    )


def test_thumbnails_are_black_where_nothing_is_encoded() -> None:
    """Two scenes that differ in a region left out alone have the same thumbnail."""
    one, other = scenes(2, seed=7)
    other[16:] = one[16:]
    kept = np.ones((9, 16), np.bool_)
    kept[:2] = False
    batch = InputBatch.of([EncoderInput(p, kept) for p in (one, other)], prep(exclude=[TOP]))
    first, second = thumbnail_features(batch)
    assert torch.equal(first, second)
    shown = InputBatch.of([EncoderInput(p) for p in (one, other)], prep())
    assert not torch.equal(*thumbnail_features(shown))


def test_thumbnails_of_pictures_with_grids_of_their_own() -> None:
    """A picture that fills a third of the grid is compared whole, and not its strip."""
    frame = noisy(scenes(1, seed=8))[0]
    small = frame[:48, :64]
    inputs = [EncoderInput(p, np.ones((len(p) // 8, p.shape[1] // 8), np.bool_)) for p in (small,)]
    batch = InputBatch.of(inputs, prep(fit="whole"))
    assert batch.pixels.shape[-2:] == (8, 8 * 9 * 16)
    np.testing.assert_allclose(
        thumbnail_features(batch).numpy(), thumbnails(small[None]), rtol=1e-4
    )


def probed(frames: np.ndarray, first: int) -> ProbeSet:
    """A set whose features, labels and numbers say which sample they are of."""
    number_N = np.arange(first, first + len(frames))
    return ProbeSet(
        uri=f"from {first}",
        features={"encoder": number_N[:, None].astype(np.float32)},
        labels_N=number_N % 2,
        places_N3=np.stack([number_N] * 3, axis=1),
        ids_N16=np.repeat(number_N[:, None], 16, axis=1).astype(np.uint8),
        tokens={"encoder": number_N[:, None, None].astype(np.float16)},
        pixels=InputBatch(torch.from_numpy(frames)),
        numbers={"score": number_N.astype(np.float64)},
        thumbnails_NP=thumbnails(frames),
    )


def test_near_duplicates_are_left_out_of_all_that_is_probed() -> None:
    train = probed(scenes(20, seed=10), 0)
    frames = scenes(5, seed=11)
    frames[[1, 3]] = noisy(scenes(20, seed=10)[[4, 9]])
    test = probed(frames, 100)
    left = without_near_duplicates(test, train, 16.0)
    assert left.labels_N.tolist() == [0, 0, 0]
    for values in (*left.features.values(), *left.tokens.values(), *left.numbers.values()):
        assert values.ravel().tolist() == [100, 102, 104]
    assert left.places_N3[:, 0].tolist() == left.ids_N16[:, 0].tolist() == [100, 102, 104]
    assert left.pixels is not None
    assert torch.equal(left.pixels.pixels, torch.from_numpy(frames[[0, 2, 4]]))
    assert left.duplicates is not None
    assert (left.duplicates["test"], left.duplicates["removed"]) == (5, 2)
    (note,) = near_duplicate_notes({"data": {}, "test": {"near_duplicates": left.duplicates}})
    assert note.startswith("--test: 2 of 5 samples (40.0%) are left out")
    none = without_near_duplicates(probed(scenes(5, seed=11), 100), train, 16.0)
    assert len(none.labels_N) == 5
    with pytest.raises(ValueError, match="--near-duplicates 16: every sample of from 0"):
        without_near_duplicates(train, train, 16.0)


def test_near_duplicates_are_not_taken_for_samples_without_a_label() -> None:
    train = probed(scenes(20, seed=10), 0)
    test = probed(scenes(20, seed=10)[:8], 100)
    test = without_near_duplicates(
        dataclasses.replace(test, thumbnails_NP=thumbnails(noisy(scenes(8, seed=12)))), train, 4.0
    )
    frames = np.concatenate([scenes(20, seed=10)[:2], scenes(6, seed=13)])
    some = without_near_duplicates(probed(frames, 100), train, 4.0)
    manifests = [manifest(20), manifest(9)]
    for part, lost in ((test, 1), (some, 1)):  # a ninth sample has no label
        assert facts_of(manifests, [train, part], all_rows=True)["--test"].unlabelled == lost
    assert len(some.labels_N) == 6


def manifest(samples: int) -> Manifest:
    return Manifest(
        num_samples=samples,
        num_bytes=0,
        shards=(),
        mean=(0, 0, 0),
        std=(1, 1, 1),
        quarantined={},
        duplicates=0,
        ingest={},
        fingerprint="",
    )


def test_repeated_states() -> None:
    train = np.array([[1, 2], [3, np.nan]], np.float32)
    test = np.array([[1, 2.5], [3, np.nan], [1, 2]], np.float32)
    assert repeated_states(train, test).tolist() == [False, True, True]
