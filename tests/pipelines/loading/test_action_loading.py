"""World models get the actions between the frames of a clip, the same on any number of workers."""

from __future__ import annotations

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from helpers.models.video_files import number_of
from helpers.pipelines.clips import ROWS, segment, write_rows
from helpers.pipelines.loading import assert_equal, global_batches
from pipelines.config.data import ClipConfig, DataConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.loading.actions import ActionError, ActionReader
from pipelines.loading.loader import make_reader, to_batch
from pipelines.loading.mixing import training_sets
from pipelines.loading.plan import pieces
from pipelines.loading.read_tasks import read_piece

STRIDE, WINDOW = 2, 5


def acted(number: int) -> dict:
    """A segment whose frame f has the action (f, 100 + number)."""
    row = segment(number)
    return row | {"actions": [[float(f), 100.0 + number] for f in range(row["num_frames"])]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("acted"), [acted(n) for n in range(ROWS)])


def config(shards: str, **settings) -> PretrainConfig:
    objective = {"window": WINDOW, "action_width": 2 * STRIDE, **settings.pop("objective", {})}
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    return PretrainConfig(
        data=DataConfig(train=shards, batch_size=16, lanes=4, shuffle_window=6, **whole),
        clip=ClipConfig(stride=STRIDE),
        model=ModelConfig(encoder="vit_micro32", image_size=32, patch_size=8),
        objective=ObjectiveConfig(name="worldmodel", **objective),
    )


def read_here(cfg: PretrainConfig, steps: int) -> list[dict]:
    """The batches of one worker, by the functions that Ray's tasks call, in this process."""
    reader = make_reader(cfg, 0, 1)
    blocks = [
        block for piece in pieces(reader.plan, 0, steps) for block in read_piece(reader, piece)
    ]
    whole, size = pa.concat_tables(blocks), reader.local_batch
    with ThreadPoolExecutor(1) as pool:
        return [
            to_batch(cfg, reader, whole.slice(step * size, size).combine_chunks(), step, pool)
            for step in range(steps)
        ]


def test_actions_are_those_of_the_frames_shown(shards: str) -> None:
    batches = read_here(config(shards), 4)
    for batch in batches:
        clips, actions = batch["clips"], batch["actions"]
        assert clips.shape == (16, 3, WINDOW, 32, 32)
        assert actions.shape == (16, WINDOW - 1, 2 * STRIDE)
        for clip, between, frames in zip(clips, actions, batch["frames"], strict=True):
            shown = [number_of(frame.permute(1, 2, 0).numpy()) for frame in clip.transpose(0, 1)]
            assert shown == frames.tolist()
            for t, (first, after) in enumerate(itertools.pairwise(frames)):
                if after - first == STRIDE:
                    assert between[t, ::2].tolist() == list(range(first, after))
                    assert between[t, 1] == between[t, 3]
                else:
                    assert between[t].isnan().all()  # the segment has ended
    everything = torch.cat([batch["actions"] for batch in batches])
    assert 0 < everything.isnan().any(-1).float().mean() < 0.5


@pytest.mark.ray
def test_batches_do_not_depend_on_the_number_of_workers(shards: str, ray_local: None) -> None:
    later = global_batches(config(shards), 2, 2, 4)
    for one, two in zip(read_here(config(shards), 4)[2:], later, strict=True):
        torch.testing.assert_close(one.pop("actions"), two.pop("actions"), equal_nan=True)
        assert_equal([one], [two])


def table(actions: list | None) -> pa.Table:
    return pa.table(
        {
            "actions": pa.array([actions], pa.list_(pa.list_(pa.float32()))),
            "source_uri": ["walk.mp4"],
        }
    )


def test_between_takes_the_actions_from_each_frame_up_to_the_next() -> None:
    reader = ActionReader(width=3, stride=3)
    frames = np.array([[1, 4, 7, 9]], np.int32)
    found = reader.between(table([[float(f)] for f in range(10)]), frames)
    expected = [[[1, 2, 3], [4, 5, 6], [np.nan] * 3]]
    np.testing.assert_equal(found, np.array(expected, np.float32))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_is_refused_where_a_clip_shows_it(wrong: float) -> None:
    reader = ActionReader(width=1, stride=1)
    walk = table([[wrong], [1.0], [2.0], [wrong], [wrong]])
    assert reader.between(walk, np.array([[1, 2, 3]], np.int32)).tolist() == [[[1.0], [2.0]]]
    with pytest.raises(ActionError, match=r"walk\.mp4: the action of frame 3 is NaN or infinite"):
        reader.between(walk, np.array([[2, 3, 4]], np.int32))


def test_walks_too_short_to_show_what_an_action_did_are_refused(tmp_path: Path) -> None:
    rows = [acted(n) | {"num_frames": 2} for n in range(ROWS)]
    with pytest.raises(ValueError, match=r"--data\.train: the longest .* 2 frames.*\n.* take 3 "):
        training_sets(config(write_rows(tmp_path, rows)))


def test_segments_without_actions_are_refused_before_training(tmp_path: Path, shards: str) -> None:
    silent = write_rows(tmp_path, [segment(n) for n in range(ROWS)])
    with pytest.raises(ValueError, match=r"--data\.train: clip-0: the segment has no actions"):
        training_sets(config(silent))
    narrow = config(shards, objective={"action_width": 6})
    with pytest.raises(ValueError, match=r"2 numbers a frame.*\nSet --objective.action-width 4\."):
        training_sets(narrow)
    with pytest.raises(ActionError, match=r"walk\.mp4: the segment has no actions"):
        ActionReader(width=2, stride=1).between(table(None), np.zeros((1, 2), np.int32))


@pytest.mark.parametrize(
    ("section", "settings", "flag"),
    [
        ("clip", ClipConfig(fps=5.0), "clip.stride"),
        ("clip", ClipConfig(stride=3), "clip.stride"),
        ("data", DataConfig(), "data.crop-scale"),
        (
            "model",
            ModelConfig(encoder="vit_micro32", image_size=32, patch_size=8, frames=4),
            "model.frames",
        ),
    ],
)
def test_settings_that_would_part_frames_and_actions_are_refused(
    shards: str, section: str, settings: object, flag: str
) -> None:
    with pytest.raises(ValueError, match=f"--{flag}"):
        dataclasses.replace(config(shards), **{section: settings})
