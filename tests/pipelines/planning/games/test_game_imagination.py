"""Errors of imagined places: none for a perfect model, no gain for one that copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.pipelines.fake_doom import fake_world
from models.planning.world_model.world_model import WorldModel
from pipelines.planning.games import walks as walks_module
from pipelines.planning.games.imagination import (
    clips_of,
    open_loop,
    read_changes,
    read_places,
    stacked,
)
from pipelines.planning.games.readout import fit_readout
from pipelines.planning.games.walks import HeldChoices, Walk, fetch_game_walks, walk
from pipelines.planning.games.worlds import (
    GAME_WORLDS,
    Quantity,
    paddle_and_ball,
    stepped,
    steps_made,
)

SHIFT = torch.tensor([[5.0, 0.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
"""What each of three buttons adds to a state."""


class Known:
    """A world in which buttons shift the state, which is the place."""

    history = 1

    def __init__(self, moves: float = 1.0) -> None:
        self.moves = moves

    def rollout(self, states: Tensor, actions: Tensor) -> Tensor:
        return (states[:, None] + self.moves * (actions @ SHIFT).cumsum(1))[None]


def made_walks(count: int, frames: int = 30) -> tuple[list[Walk], list[Tensor]]:
    rng = np.random.default_rng(0)
    found, states = [], []
    for _ in range(count):
        actions = np.eye(3, dtype=np.float32)[rng.integers(3, size=frames)]
        start = np.array([*rng.uniform(0, 300, 2), 0.6, 0.8], np.float32)
        moved = np.concatenate([np.zeros((1, 4)), (actions @ SHIFT.numpy()).cumsum(0)[:-1]])
        places = (start + moved).astype(np.float32)
        pixels = np.zeros((frames, 2, 2, 3), np.uint8)
        found.append(Walk(frames_THW3=pixels, actions_TA=actions, places_TP=places))
        states.append(torch.from_numpy(places))
    return found, states


def measured(model: Any) -> dict[str, Any]:
    world, (walks, states) = GAME_WORLDS["my_way_home"], made_walks(12)
    readout = fit_readout(states, [one.places_TP for one in walks], steps=200)
    clips = clips_of(states, walks)

    def changes(pairs: torch.Tensor) -> torch.Tensor:
        before, after = pairs.numpy()[..., :4], pairs.numpy()[..., 4:]
        return torch.from_numpy(world.changes(after, before))

    return open_loop(world, model, readout, changes, clips)


def test_a_model_that_knows_the_world_errs_as_what_is_seen_and_its_controls_more() -> None:
    position = measured(Known())["open_loop"]["position"]
    for steps in ("1", "5", "10"):
        # What it imagines is what comes, so only the readout errs.
        assert position["model"][steps]["mean"] == pytest.approx(position["seen"][steps]["mean"])
    for steps in ("5", "10"):
        error = {name: position[name][steps]["mean"] for name in ("model", "shuffled", "copy_last")}
        assert error["model"] < 0.6 * error["copy_last"]
        assert error["model"] < 0.6 * error["shuffled"]
        assert position["gain"][steps]["interval"][0] > 0
    assert position["copy_true"]["10"]["mean"] > position["copy_true"]["1"]["mean"] > 1
    assert position["model"]["1"]["walks"] == 12


def test_a_model_that_imagines_no_change_gains_nothing() -> None:
    """The negative control."""
    position = measured(Known(moves=0.0))["open_loop"]["position"]
    for steps in ("1", "5", "10"):
        assert position["gain"][steps]["mean"] == pytest.approx(0, abs=1e-5)
        assert position["model"][steps] == position["copy_last"][steps]


def test_changes_are_told_as_who_walks_sees_them() -> None:
    look = np.deg2rad(90)
    before = np.array([[10, 20, np.sin(look), np.cos(look)]], np.float32)
    after = np.array([[7, 25, np.sin(look + 0.3), np.cos(look + 0.3)]], np.float32)
    found = steps_made(after, before)
    np.testing.assert_allclose(found, [[5, 3, np.sin(0.3), np.cos(0.3)]], atol=1e-5)
    np.testing.assert_allclose(steps_made(after, after), [[0, 0, 0, 1]], atol=1e-5)
    np.testing.assert_allclose(stepped(before, found), after, atol=1e-5)
    np.testing.assert_allclose(stepped(0.5 * before, found)[:, 2:], after[:, 2:], atol=1e-5)
    known, still = (measured(Known(moves))["changes"]["position"] for moves in (1.0, 0.0))
    assert "copy_last" not in known
    for step in ("1", "5", "10"):
        assert known["model"][step]["mean"] == pytest.approx(0, abs=1e-3)
        assert known["gain"][step]["interval"][0] > 0
        assert still["gain"][step]["mean"] == pytest.approx(0, abs=1e-3)


def test_readouts_learn_from_what_was_seen_and_what_was_imagined() -> None:
    world, (walks, states) = GAME_WORLDS["my_way_home"], made_walks(12)
    clips, model = clips_of(states, walks), cast(WorldModel, Known())
    changes = read_changes(world, model, clips, steps=150)
    places = read_places(model, states, walks, steps=150)
    found = open_loop(world, model, places, changes, clips)
    for of in (found["open_loop"], found["changes"]):
        assert of["position"]["gain"]["10"]["interval"][0] > 0


def test_frames_are_stacked_with_those_before_them() -> None:
    frames = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    found = stacked(frames, 3)
    assert found.shape == (4, 9, 2, 2)
    assert found[:, ::3, 0, 0].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]


def test_angles_are_compared_around_the_circle() -> None:
    angle = Quantity(name="angle", columns=(0, 1), kind="angle", unit="degrees")
    degrees = np.deg2rad(np.array([[359.0, 10.0], [1.0, 190.0]]))
    found, true = np.stack([np.sin(degrees), np.cos(degrees)], axis=-1).astype(np.float32)
    np.testing.assert_allclose(angle.error(3 * found, true), [2, 180], atol=1e-3)


def test_a_ball_that_is_not_there_has_no_place_and_does_not_count() -> None:
    names = ("ram_72", "ram_99", "ram_101")
    states = np.array([[10, 20, 30], [11, 21, 0]], np.float32)
    places = paddle_and_ball(states, names)
    assert places[0].tolist() == [10, 20, 30]
    assert places[1, 0] == 11
    assert np.isnan(places[1, 1:]).all()


def test_walks_hold_their_choices_and_a_seed_fixes_them() -> None:
    player = fake_world().start()
    first, again, other = (walk(player, seed, 40) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.places_TP, again.places_TP)
    np.testing.assert_array_equal(first.frames_THW3, again.frames_THW3)
    assert not np.array_equal(first.places_TP, other.places_TP)
    drawn = [HeldChoices(5, np.random.default_rng(0))]
    presses = np.array([drawn[0]() for _ in range(4000)])
    assert np.mean(presses[1:] == presses[:-1]) == pytest.approx(0.75 + 0.25 / 5, abs=0.03)


def test_what_was_pressed_at_a_frame_led_to_the_next() -> None:
    player = fake_world().start()
    found = walk(player, 3, 60)
    forward, left = found.actions_TA[:-1, 0], found.actions_TA[:-1, 1]
    moved = np.linalg.norm(np.diff(found.places_TP[:, :2], axis=0), axis=1)
    turned = np.diff(np.unwrap(np.arctan2(found.places_TP[:, 2], found.places_TP[:, 3])))
    assert (moved[forward == 0] == 0).all()
    assert (moved[forward == 1] > 0).mean() > 0.5
    assert (turned[left == 1] > 0).all()


def test_walks_are_written_as_videos_with_actions_and_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walks_module, "GAME_WORLDS", {"my_way_home": fake_world()})
    fetch_game_walks("my_way_home", tmp_path, 4, seed=0, frames=20)
    videos = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.mp4"))
    assert videos == [f"test/{0:05d}.mp4", *(f"train/{n:05d}.mp4" for n in range(4))]
    assert np.load(tmp_path / "train/00000.actions.npy").shape == (20, 3)
    assert np.load(tmp_path / "train/00000.states.npy").shape == (20, 4)
    before = (tmp_path / "train/00001.mp4").stat().st_mtime_ns
    fetch_game_walks("my_way_home", tmp_path, 5, seed=0, frames=20)
    assert (tmp_path / "train/00001.mp4").stat().st_mtime_ns == before
    assert (tmp_path / "train/00004.mp4").exists()
