"""Walks in Two-Rooms as files: what is drawn, what is written beside it, and continuing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.pipelines.refusals import teller
from models.media.videos import decode_frames
from models.planning.worlds.two_rooms import TwoRooms
from pipelines.fetch import FetchConfig
from pipelines.fetchers.two_rooms import FRAMES, fetch_tworooms


def test_frames_states_and_actions_of_a_walk_belong_together(tmp_path: Path) -> None:
    fetch_tworooms(tmp_path, 4, seed=0)
    assert len(list(tmp_path.glob("train/*.mp4"))) == 4
    assert len(list(tmp_path.glob("test/*.mp4"))) == 1
    for video in sorted(tmp_path.glob("*/*.mp4")):
        actions, states = (
            torch.from_numpy(np.load(video.with_name(f"{video.stem}.{name}.npy")))
            for name in ("actions", "states")
        )
        assert actions.shape == states.shape == (FRAMES, 2)
        moved = TwoRooms().step(states[:-1], actions[:-1])
        torch.testing.assert_close(moved, states[1:])  # row t leads from frame t to t + 1
        shown = torch.from_numpy(decode_frames(video.read_bytes(), range(FRAMES)))
        drawn = TwoRooms().render(states).permute(0, 2, 3, 1)
        # Red and green hold only the dot; H.264 halves the resolution of colour, not of the dot.
        error = (shown.float() - drawn.float())[..., :2].abs()
        assert error.mean() < 2
        assert error[1:, :, :, 1].max() < 40


def test_walks_do_not_depend_on_their_number_and_splits_differ(tmp_path: Path) -> None:
    fetch_tworooms(tmp_path / "few", 2, seed=3)
    fetch_tworooms(tmp_path / "many", 5, seed=3)
    fetch_tworooms(tmp_path / "other", 2, seed=4)

    def states(folder: str, split: str, index: int) -> np.ndarray:
        return np.load(tmp_path / folder / split / f"{index:05d}.states.npy")

    assert (states("few", "train", 1) == states("many", "train", 1)).all()
    assert (states("few", "train", 0) != states("few", "test", 0)).any()
    assert (states("few", "train", 0) != states("other", "train", 0)).any()
    video = tmp_path / "few/train/00001.mp4"
    assert video.read_bytes() == (tmp_path / "many/train/00001.mp4").read_bytes()
    video.write_bytes(b"kept")
    fetch_tworooms(tmp_path / "few", 2, seed=3)
    assert video.read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("dataset", "flags", "told"),
    [
        ("tworooms", {"walks": 0}, "--walks: must be at least 1, got 0"),
        ("tworooms", {"out": "s3://bucket/rooms"}, "--out: needs a folder .* s3://bucket/rooms"),
        ("tworooms", {"games": ("pong",)}, "--games: is for gameplay"),
        ("sample", {"seed": 3}, "--seed: is for gameplay, movingmnist, tworooms"),
        ("movingmnist", {"clips": 0}, "--clips: must be positive, got 0"),
        ("movingmnist", {"walks": 3}, "--walks: is for tworooms, my_way_home, breakout"),
        ("gameplay", {"minutes": 0.0}, "--minutes: must be positive, got 0"),
        ("gameplay", {"minutes": math.nan}, "--minutes: must be positive, got nan"),
    ],
)
def test_what_cannot_be_fetched_is_refused(dataset: Any, flags: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FetchConfig(**{"dataset": dataset, "out": "rooms"} | flags)


def test_a_folder_without_a_name_is_not_the_one_you_are_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = teller(monkeypatch, capsys)("fetch", "tworooms", "--out", "", "--walks", "1")
    assert told.startswith("error: --out: it is empty")
    assert not list(tmp_path.iterdir())
