"""Recorded games: episodes, sizes, the variants of the HUD, and what Doom says is in view."""

from __future__ import annotations

import json
import os
import signal
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from models.media.videos import decode_frames
from pipelines.fetch import FetchConfig
from pipelines.fetchers.games import recording
from pipelines.fetchers.games.doom import DoomGame, engine_resolution
from pipelines.fetchers.games.frame_size import broadcast, parse_size, resize
from pipelines.fetchers.games.recording import Footage, next_action, record_games
from pipelines.runtime.errors import FetchError

ALL = ("hud", "nohud", "hud_b", "hud_c")


class FakeGame:
    """A game of two frames' memory: what is seen is how often it was played."""

    rate = Fraction(15)
    buttons = ("left", "right")
    variables: tuple[str, ...] = ("step", "last")

    def __init__(self, name: str) -> None:
        self.actions: list[tuple[int, ...]] = [(0, 0), (1, 0), (0, 1)]

    def reset(self, seed: int) -> None:
        self._step, self._last = 0, -1

    def frames(self) -> dict[str, np.ndarray]:
        shown = np.full((32, 32, 3), min(2 * self._step, 255), np.uint8)
        return {"hud": shown, "nohud": shown}

    def state(self) -> list[float]:
        return [float(self._step), float(self._last)]

    def act(self, action: int) -> bool:
        self._step, self._last = self._step + 1, action
        return self._step < 100

    def close(self) -> None:
        pass


@pytest.fixture
def fake_pong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "AtariGame", FakeGame)


@pytest.mark.usefixtures("fake_pong")
def test_episodes_fill_the_time_and_keep_state_and_action_in_step(tmp_path: Path) -> None:
    seconds = record_games(tmp_path, 0.5, 7, ("pong",))
    assert seconds == pytest.approx(30, abs=1)
    paths = sorted(tmp_path.glob("*/pong/*.mp4"))
    assert len(paths) == 2 * 2 * 3  # variants, policies, episodes of 100, 100 and 25 frames
    for path in paths:
        actions = np.load(path.with_name(f"{path.stem}.actions.npy"))
        states = np.load(path.with_name(f"{path.stem}.states.npy"))
        frames = decode_frames(path.read_bytes(), range(len(states)))
        assert np.abs(frames[:, 16, 16, 0] / 2 - states[:, 0]).max() <= 2
        number = actions @ [1, 2]  # the action of row t is the last one of row t + 1
        assert number[:-1].tolist() == states[1:, 1].tolist()
    stamps = [path.stat().st_mtime_ns for path in paths]
    record_games(tmp_path, 0.5, 7, ("pong",))
    assert [path.stat().st_mtime_ns for path in paths] == stamps


@pytest.mark.usefixtures("fake_pong")
def test_episodes_with_fewer_columns_are_recorded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_games(tmp_path, 0.1, 7, ("pong",))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.mp4")}
    monkeypatch.setattr(FakeGame, "variables", ("step", "last", "twice"))
    monkeypatch.setattr(FakeGame, "state", lambda self: [self._step, self._last, 2 * self._step])
    record_games(tmp_path, 0.1, 7, ("pong",))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.mp4")} == before
    assert {np.load(path).shape[1] for path in tmp_path.rglob("*.states.npy")} == {3}


@pytest.mark.usefixtures("fake_pong")
def test_a_square_shows_the_whole_screen(tmp_path: Path) -> None:
    screen = np.zeros((40, 80, 3), np.uint8)
    screen[:8] = 200  # a HUD
    screen[:, 76:] = 100
    small = resize(screen, 20, 20)
    assert small.shape == (20, 20, 3)
    assert (small[:4, :19] == 200).all()
    assert (small[4:, 19] == 100).all()
    assert (small[4:, :19] == 0).all()
    record_games(tmp_path, 0.1, 7, ("pong",), Footage(size=(16, 16), squeeze=True))
    path = next(tmp_path.glob("*/pong/*.mp4"))
    assert decode_frames(path.read_bytes(), [0]).shape == (1, 16, 16, 3)


def test_broadcast_leaves_the_sides_free() -> None:
    screen = np.full((210, 160, 3), 90, np.uint8)
    frame = broadcast(screen, 72, 128)
    assert frame.shape == (72, 128, 3)
    assert (frame[:, 28:100] == 90).all()
    assert not frame[:, :28].any()
    assert not frame[:, 100:].any()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"side": 15}, "--side"),
        ({"side": 8}, "--side"),
        ({"size": "144"}, "--size"),
        ({"size": "144x255"}, "--size"),
        ({"size": "144x-256"}, "--size"),
        ({"size": "144x256", "side": 84}, "--size or --side"),
        ({"variants": ()}, "--variants"),
        ({"variants": ("hud", "hud")}, "--variants"),
    ],
)
def test_flags_are_checked(flags: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        FetchConfig(dataset="gameplay", out=str(tmp_path), **flags)


def test_policies() -> None:
    rng, action, taken = np.random.default_rng(0), 0, []
    for step in range(1, 37):
        taken.append(action)
        action = next_action("scripted", action, step, 3, rng)
    assert taken == [0] * 12 + [1] * 12 + [2] * 12
    same = [next_action("random", 0, 0, 4, rng) == 0 for _ in range(4000)]
    assert np.mean(same) == pytest.approx(0.9 + 0.1 / 4, abs=0.02)


def test_games_need_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ale_py", "vizdoom"):
        monkeypatch.setitem(sys.modules, module, None)
    for game in ("pong", "my_way_home"):
        with pytest.raises(RuntimeError, match=r'extra `games`: pip install -e "\.\[games\]"'):
            record_games(tmp_path, 1.0, 0, (game,))
    with pytest.raises(ValueError, match="--games: unknown"):
        record_games(tmp_path, 1.0, 0, ("chess",))


def middle_frame(root: Path, variant: str) -> np.ndarray:
    path = sorted((root / variant).rglob("random*.mp4"))[0]
    return decode_frames(path.read_bytes(), [10])[0].astype(int)


@pytest.fixture(scope="module", params=[("ale_py", "seaquest"), ("vizdoom", "my_way_home")])
def real_footage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same footage of a real game twice, in folders `a` and `b`, in all variants."""
    module, game = request.param
    pytest.importorskip(module)
    root = tmp_path_factory.mktemp("footage")
    for folder in ("a", "b"):
        record_games(root / folder, 0.1, 5, (game,), Footage(variants=ALL))
    return root


def test_real_games_are_reproducible_and_differ_by_the_hud_alone(real_footage: Path) -> None:
    files = {p.relative_to(real_footage / "a"): p for p in (real_footage / "a").rglob("*.*")}
    for name, path in files.items():
        assert path.read_bytes() == (real_footage / "b" / name).read_bytes(), name
    names = {path.name for path in files if path.name.endswith(".states.npy")}
    for name in names:
        states = [np.load(p) for p in (real_footage / "a").rglob(name)]
        assert len(states) == len(ALL)
        for other in states[1:]:
            np.testing.assert_array_equal(other, states[0])
    own, none = (middle_frame(real_footage / "a", variant) for variant in ("hud", "nohud"))
    assert np.abs(own - none)[int(0.85 * len(own)) :].mean() > 10


def test_drawn_huds_are_at_the_edges_and_differ(real_footage: Path) -> None:
    none = middle_frame(real_footage / "a", "nohud")
    drawn = [middle_frame(real_footage / "a", variant) for variant in ("hud_b", "hud_c")]
    width = none.shape[1]
    for picture in drawn:
        changed = np.abs(picture - none).max(2) > 60
        assert changed.mean() > 0.03
        assert changed[:, 3 * width // 10 : 7 * width // 10].mean() < 0.01
    assert (np.abs(drawn[0] - drawn[1]).max(2) > 60).mean() > 0.05


def test_other_seeds_play_other_games_under_the_policy_that_does_not_roll_dice(
    tmp_path: Path,
) -> None:
    pytest.importorskip("ale_py")
    for seed in range(6):
        record_games(tmp_path, 0.1, seed, ("pong",), Footage(variants=("hud",)))
    paths = sorted((tmp_path / "hud" / "pong").glob("scripted-*.mp4"))
    assert len(paths) == 6
    assert len({path.read_bytes() for path in paths}) == 6


def test_doom_is_drawn_in_the_aspect_of_the_frames() -> None:
    pytest.importorskip("vizdoom")
    names = {"120x160": "160X120", "72x128": "256X144", "144x256": "256X144", "180x320": "320X180"}
    for size, name in names.items():
        assert engine_resolution(parse_size(size)) == f"RES_{name}"
    with pytest.raises(ValueError, match="--size: Doom"):
        engine_resolution((4000, 4000))


def children() -> set[int]:
    """The processes that this one started."""
    lists = Path("/proc/self/task").glob("*/children")
    return {int(process) for file in lists for process in file.read_text().split()}


def test_a_crash_of_the_engine_says_that_the_command_goes_on() -> None:
    pytest.importorskip("vizdoom")
    before = children()
    game = DoomGame("my_way_home", own_hud=False)
    game.reset(1)
    game.act(0)
    (engine,) = children() - before
    os.kill(engine, signal.SIGKILL)
    with pytest.raises(FetchError, match="run the same command again"):
        game.act(0)
    game.close()


def test_what_is_in_view_changes_with_the_picture(tmp_path: Path) -> None:
    """Health packs lie about; where the nearest is close, more of the picture is light green."""
    pytest.importorskip("vizdoom")
    record_games(tmp_path, 0.5, 1, ("health_gathering",), Footage(variants=("nohud",)))
    names = json.loads((tmp_path / "columns.json").read_text())["health_gathering"]["states"]
    assert names[-3:] == ["objects_in_view", "nearest_distance", "depth_ahead"]
    states = np.concatenate([np.load(path) for path in sorted(tmp_path.rglob("*.states.npy"))])
    count, nearest, ahead = states[:, -3:].T
    assert count.min() == 0
    assert count.max() >= 4
    assert (np.isnan(nearest) == (count == 0)).all()
    assert np.nanmin(nearest) < 200 < np.nanmax(nearest) < 1500
    assert np.isfinite(ahead).all()
    assert ahead.std() > 5
