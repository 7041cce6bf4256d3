"""Batches of clips: their frames, one crop for each, and equality for all workers and decoders.

Every frame of the made-up videos tells its number (`video_files.number_of`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from helpers.models.video_files import number_of, picture
from helpers.pipelines.clips import FPS, LENGTHS, ROWS, segment, write_rows
from helpers.pipelines.loading import assert_equal, global_batches
from models.image_size import Grid
from models.keyed_random.arrays import sample_keys
from models.media.videos import decode_frames
from pipelines.config.data import ClipConfig, DataConfig, MaskConfig, VideoMaskConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.dataset.shards import (
    VIDEO_SCHEMA,
)
from pipelines.loading.clips import ClipSampler
from pipelines.loading.decoding import DecodeError, decode_rows
from pipelines.loading.loader import make_reader
from pipelines.loading.masks.spacetime import video_masks


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("clips"), [segment(n) for n in range(ROWS)])


def config(shards: str, **sections) -> PretrainConfig:
    clip = {"stride": 3, **sections.get("clip", {})}
    settings = {"batch_size": 16, "lanes": 4, "shuffle_window": 6, **sections.get("data", {})}
    return PretrainConfig(
        data=DataConfig(train=shards, **settings),
        clip=ClipConfig(**clip),
        video_mask=sections.get("mask", VideoMaskConfig()),
        model=ModelConfig(encoder="video_micro", image_size=32, patch_size=8, frames=4, tubelet=2),
        objective=ObjectiveConfig(name="vjepa", loss="l1"),
    )


@pytest.fixture(scope="module")
def alone(clips: str, ray_local: None) -> list[dict]:
    """Five steps of one worker, over two epoch boundaries."""
    return global_batches(config(clips), 1, 0, 5)


# --- choice of frames


def sampler(frames: int = 4, **settings) -> ClipSampler:
    return ClipSampler(frames=frames, settings=ClipConfig(**settings))


def keys(count: int, epoch: int = 0) -> np.ndarray:
    return sample_keys([i.to_bytes(16, "big") for i in range(count)], 0, epoch)


def test_clips_are_spaced_by_the_stride_and_start_anywhere() -> None:
    frames = sampler(stride=3).random(np.full(2000, 20), np.full(2000, FPS), keys(2000))
    assert (np.diff(frames, axis=1) == 3).all()
    starts, counts = np.unique(frames[:, 0], return_counts=True)
    assert starts.tolist() == list(range(11))  # 20 frames hold 11 clips of 10
    assert counts.min() > 0.6 * 2000 / 11
    other = sampler(stride=3).random(np.full(2000, 20), np.full(2000, FPS), keys(2000, epoch=1))
    assert (other != frames).any(1).mean() > 0.8
    some = sampler(stride=3).random(np.full(3, 20), np.full(3, FPS), keys(2000)[[5, 900, 7]])
    assert (some == frames[[5, 900, 7]]).all()


def test_a_rate_means_the_same_seconds_whatever_the_segment_was_stored_at() -> None:
    lengths, rates = np.array([300, 120, 299]), np.array([30.0, 12.0, 29.97])
    frames = sampler(fps=4.0).middle(lengths, rates)
    np.testing.assert_allclose(
        np.diff(frames, axis=1) / rates[:, None], 0.25, atol=1 / rates.min() / 1.99
    )
    assert np.diff(frames[1]).tolist() == [3, 3, 3]
    assert np.diff(frames[0]).tolist() == [7, 8, 7]


def test_a_short_segment_repeats_its_last_frame_and_without_jitter_the_clip_is_central() -> None:
    found = sampler(stride=3).random(np.array([5, 1]), np.full(2, FPS), keys(2))
    assert found.tolist() == [[0, 3, 4, 4], [0, 0, 0, 0]]
    still = sampler(stride=3, jitter=False)
    lengths, rates = np.array([20, 11]), np.full(2, FPS)
    assert still.random(lengths, rates, keys(2)).tolist() == [[5, 8, 11, 14], [1, 4, 7, 10]]
    assert (still.random(lengths, rates, keys(2)) == sampler(stride=3).middle(lengths, rates)).all()


# --- pixels


def table_of(row: dict, frames: list[int], box: tuple[int, ...], flipped: bool) -> pa.Table:
    table = pa.Table.from_pylist([row], VIDEO_SCHEMA)
    return (
        table.append_column("frames", pa.array([frames], pa.list_(pa.int32(), len(frames))))
        .append_column("crop", pa.array([box], pa.list_(pa.int32(), 4)))
        .append_column("flipped", pa.array([flipped]))
    )


def test_pixels_are_those_frames_under_one_box() -> None:
    row, wanted = segment(0), [2, 9, 9, 28]
    out = np.zeros((1, 3, 4, 24, 24), np.uint8)
    decode_rows(table_of(row, wanted, (0, 0, 24, 24), False), out)
    whole_THW3 = decode_frames(row["video"], wanted)
    assert (out[0].transpose(1, 2, 3, 0) == whole_THW3[:, :24, :24]).all()  # no resize: bitwise
    decode_rows(table_of(row, wanted, (0, 0, 64, 48), False), out)
    for t, number in enumerate(wanted):
        assert number_of(out[0, :, t].transpose(1, 2, 0)) == number
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(picture(number)).permute(2, 0, 1)[None].float(),
            (24, 24),
            mode="bicubic",
            antialias=True,
        )
        assert np.abs(out[0, :, t] - expected[0].clamp(0, 255).numpy()).mean() < 4  # lossy video
    flipped = np.zeros_like(out)
    decode_rows(table_of(row, wanted, (0, 0, 64, 48), True), flipped)
    assert (flipped[..., ::-1] == out).all()


def test_damaged_video_names_the_sample() -> None:
    out = np.zeros((1, 3, 4, 24, 24), np.uint8)
    box = (0, 0, 24, 24)
    with pytest.raises(DecodeError, match=r"clip-0.*not_a_video"):
        decode_rows(table_of({**segment(0), "video": b"no video at all"}, [0] * 4, box, False), out)
    with pytest.raises(DecodeError, match=r"clip-0.*no_such_frame"):
        decode_rows(table_of(segment(0), [0, 1, 2, 30], box, False), out)
    with pytest.raises(DecodeError, match=r"clip-0.*stored as 50x64"):
        decode_rows(table_of({**segment(0), "height": 50}, [0] * 4, box, False), out)


# --- batches


@pytest.mark.ray
def test_shapes_types_and_names(alone: list[dict]) -> None:
    assert [batch["epoch"] for batch in alone] == [0, 0, 1, 1, 2]
    for batch in alone:
        assert batch["clips"].shape == (16, 3, 4, 32, 32)
        assert batch["clips"].dtype == torch.uint8
        assert batch["frames"].shape == (16, 4)
        assert "images" not in batch
        for g in range(2):
            for part in ("context", "target"):
                ids = batch[f"{part}_ids_{g}"]
                assert ids.dtype == torch.int64
                assert ids.shape[0] == 16
        assert batch["labels"].min() >= 0


@pytest.mark.ray
def test_masks_frames_and_pixels_are_those_of_the_sample(alone: list[dict]) -> None:
    numbers = {segment(n)["sample_id"]: n for n in range(ROWS)}
    for batch in alone:
        lengths = [LENGTHS[numbers[sample] % len(LENGTHS)] for sample in batch["sample_ids"]]
        of_samples = sample_keys(batch["sample_ids"], 0, batch["epoch"])
        expected = sampler(stride=3).random(lengths, np.full(16, FPS), of_samples)
        assert (batch["frames"] == expected).all()
        for g, (context, target) in enumerate(
            video_masks(of_samples, Grid(4, 4, 2), VideoMaskConfig())
        ):
            assert (batch[f"context_ids_{g}"].numpy() == context).all()
            assert (batch[f"target_ids_{g}"].numpy() == target).all()
        # Bottom right is the plain part: of a clip whose crop ends there, numbers can be read.
        for row in np.flatnonzero((batch["crop_boxes"][:, 2:] == (64, 48)).all(1)):
            frames_THW3 = batch["clips"][row].permute(1, 2, 3, 0).numpy()
            found = [number_of(frame[28:, 28:]) for frame in frames_THW3]
            assert found == (batch["frames"][row] % 39).tolist()


@pytest.mark.ray
@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_workers_gives_the_same_batches(
    clips: str, alone: list[dict], world_size: int
) -> None:
    assert_equal(global_batches(config(clips), world_size, 0, 3), alone[:3])


@pytest.mark.ray
def test_a_resume_and_the_other_decoder_give_the_same_batches(
    clips: str, alone: list[dict]
) -> None:
    in_data = config(clips, data={"decode_in": "data"})
    assert_equal(global_batches(in_data, 1, 2, 5), alone[2:])


@pytest.mark.ray
def test_legacy_masks_belong_to_the_global_batch(clips: str, ray_local: None) -> None:
    cfg = config(clips, mask=VideoMaskConfig(truncate="legacy", scale=(0.15, 0.4)))
    one, two = (global_batches(cfg, world_size, 0, 2) for world_size in (1, 2))
    assert_equal(one, two)


def test_shards_of_the_other_modality_are_refused(clips: str, tmp_path: Path) -> None:
    cfg = PretrainConfig(
        data=DataConfig(train=clips, batch_size=16), mask=MaskConfig(), model=ModelConfig()
    )
    with pytest.raises(ValueError, match=r"--data\.train.*ijepa"):
        make_reader(cfg, 0, 1)
    with pytest.raises(ValueError, match=r"--model\.frames"):
        PretrainConfig(model=ModelConfig(frames=4, tubelet=2))
    with pytest.raises(ValueError, match=r"--model\.tubelet"):
        ModelConfig(frames=4, tubelet=3)
    with pytest.raises(ValueError, match=r"--clip\.stride"):
        ClipConfig(fps=4.0, stride=2)
