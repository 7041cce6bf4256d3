"""Parts of live ingest without a stream: the published set, packets, waits, names and flags."""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
import signal
import threading
import time
import types
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from helpers.models.video_files import write_video
from helpers.pipelines.live_streams import LONG_S, VIDEO, config, ids
from pipelines.config.ingest import IngestConfig, LiveConfig
from pipelines.dataset.live_set import LiveSet, Progress, Timeline
from pipelines.dataset.shards import read_manifest, verify_shards
from pipelines.ingest import ingest
from pipelines.ingestion import live as following
from pipelines.ingestion.live_connection import file_identity, from_position
from pipelines.runtime.signals import stop_on_signals
from pipelines.runtime.uris import public_name


def test_a_file_that_was_short_when_it_was_opened_is_the_same_later(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    short = file_identity(str(path))
    with path.open("ab") as file:
        file.write(b"d" * 10_000)
    assert file_identity(str(path), short) == short
    assert file_identity(str(path)) != short
    path.write_bytes(b"abX")
    assert file_identity(str(path), short) != short


def row(number: int) -> dict[str, Any]:
    return {
        "sample_id": number.to_bytes(16),
        "video": b"x" * 100,
        "num_frames": 10,
        "fps": 10.0,
        "start_s": float(number),
        "height": 4,
        "width": 4,
        "source_uri": "x",
        "recorded_at": dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        "moments": [0.5] * 3 + [0.3] * 3,
    }


LINE = Timeline(identity="a", origin=Fraction(1, 3), end=Fraction(7, 3))


def test_only_one_publishes(tmp_path: Path) -> None:
    cfg = config("x", tmp_path)
    with LiveSet(cfg) as first:
        first.publish([row(0)], LINE, {})
        with pytest.raises(ValueError, match="somebody else publishes"):
            LiveSet(cfg)
        # Storage without locks: the other one has come between.
        (tmp_path / "manifest.json").write_text(
            dataclasses.replace(first.manifest, fingerprint="other").to_json()
        )
        with pytest.raises(ValueError, match="somebody else publishes"):
            first.publish([row(1)], LINE, {})
        first.manifest = read_manifest(tmp_path)
    assert ids(tmp_path) == [row(0)["sample_id"]]


def test_a_set_recognises_its_own_manifest_whatever_the_settings_hold(tmp_path: Path) -> None:
    cfg = dataclasses.replace(config("x", tmp_path), image_member=("jpg", "png"))
    with LiveSet(cfg) as live_set:
        for number in range(2):
            live_set.publish([row(number)], LINE, {})
    with LiveSet(cfg) as live_set:  # and so does the next process
        live_set.publish([row(2)], LINE, {})
    assert read_manifest(tmp_path).num_samples == 3


def test_progress_survives_and_runs_are_numbered_upwards(tmp_path: Path) -> None:
    runs = []
    for number in range(3):
        with LiveSet(config("x", tmp_path)) as live_set:
            live_set.publish([row(number)], LINE, {"corrupt": 1})
            runs.append(live_set.run)
    manifest = verify_shards(tmp_path)
    assert runs == sorted(set(runs))
    assert manifest.losses == {"corrupt": 3}
    assert manifest.mean == (0.5, 0.5, 0.5)
    assert manifest.std == pytest.approx([0.05**0.5] * 3, abs=1e-6)
    progress = Progress.from_json(manifest.live)
    assert progress.timeline == LINE
    assert progress.seconds == 3.0
    assert Progress.from_json(progress.to_json()) == progress


def test_sets_do_not_mix(tmp_path: Path) -> None:
    live, files = tmp_path / "live", tmp_path / "files"
    cfg = config("x", live)
    with LiveSet(cfg) as live_set:
        live_set.publish([row(0)], LINE, {})
    with pytest.raises(ValueError, match="--short-side"):
        LiveSet(dataclasses.replace(cfg, short_side=64))
    with pytest.raises(ValueError, match=r"--video.*crf"):
        LiveSet(dataclasses.replace(cfg, video=dataclasses.replace(VIDEO, crf=9)))
    # Ingest of files would replace the set, and remove what cannot be had again.
    raw = tmp_path / "raw"
    raw.mkdir()
    write_video(raw / "a.mp4", 3)
    with pytest.raises(ValueError, match="live stream"):
        ingest(dataclasses.replace(cfg, source=str(raw), follow=False))
    assert ids(live) == [row(0)["sample_id"]]
    files.mkdir()
    manifest = dataclasses.replace(read_manifest(live), live=None)
    (files / "manifest.json").write_text(manifest.to_json())
    with pytest.raises(ValueError, match="data set of files"):
        LiveSet(config("x", files))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        LiveSet(config("x", foreign))
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


@dataclasses.dataclass
class FakePacket:
    pts: int
    is_keyframe: bool = False
    size: int = 10
    dts: int | None = None
    time_base: Fraction = Fraction(1, 10)


def packets() -> Iterator[FakePacket]:
    """Three groups and an end; pictures of all groups but the first are not in display order."""
    yield from (FakePacket(1), FakePacket(2))  # the tail of a group whose key frame was missed
    for start in (3, 13, 23):
        yield FakePacket(start, True)
        yield from (FakePacket(start + n) for n in (2, 1, 4, 3, 6, 5, 8, 7, 9))
    yield FakePacket(0, size=0)


@pytest.mark.parametrize(
    ("position", "first"),
    [(None, 3), (Fraction(0), 3), (Fraction("1.2"), 3), (Fraction("1.3"), 13), (Fraction(2), 13)],
)
def test_packets_from_a_position_begin_with_its_key_frame(
    position: Fraction | None, first: int
) -> None:
    taken = list(from_position(packets(), position))
    whole = list(packets())
    assert taken == whole[whole.index(FakePacket(first, True)) :]


def test_nothing_but_the_end_is_left_behind_the_last_packet() -> None:
    assert list(from_position(packets(), Fraction(100))) == [FakePacket(0, size=0)]


def test_how_long_no_video_may_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = types.SimpleNamespace(now=100.0, monotonic=lambda: clock.now, time=time.time)
    monkeypatch.setattr(following, "time", clock)
    cfg = config("x", tmp_path, live=LiveConfig(open_seconds=30, end_seconds=600))
    with LiveSet(cfg) as live_set:
        follower = following.Follower(cfg, live_set, threading.Event())
        clock.now += 29
        assert not follower._tick()
        assert not follower._over()
        clock.now += 2
        assert follower._tick()
        with pytest.raises(ValueError, match="not open after 30 s: nothing came"):
            follower._over()
        follower._connections = 1
        assert not follower._over()
        clock.now += 600
        assert follower._over()


def test_waits_grow_and_stay_within_their_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live = LiveConfig(backoff_seconds=1, most_backoff_seconds=5)
    cfg = config("x", tmp_path, live=live)
    with LiveSet(cfg) as live_set:
        follower = following.Follower(cfg, live_set, threading.Event())
        monkeypatch.setattr(follower, "_tick", lambda: True)  # none of the waits takes time
        for failures in range(4):
            follower._wait(failures)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" s:")[0].rpartition(" ")[2] for line in lines] == ["1", "2", "4", "5"]


def test_signals_stop_once() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(LONG_S)
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("rtsp://me:pw@cam:554/1?token=t#x", "rtsp://cam:554/1"),
        ("tcp://[::1]:9", "tcp://[::1]:9"),
        ("/data/a#b?.ts", "/data/a#b?.ts"),
        ("-", "-"),
    ],
)
def test_public_names_hold_no_secret(source: str, shown: str) -> None:
    assert public_name(source) == shown


def test_flags_are_named() -> None:
    for flag in ("publish", "open", "read", "backoff", "most_backoff", "end"):
        with pytest.raises(ValueError, match=f"--live.{flag.replace('_', '-')}-seconds"):
            LiveConfig(**{f"{flag}_seconds": 0})
    with pytest.raises(ValueError, match=r"--live.options: 'rtsp_transport'"):
        LiveConfig(options=("rtsp_transport",))
    with pytest.raises(ValueError, match=r"--live.backoff-seconds"):
        LiveConfig(backoff_seconds=9, most_backoff_seconds=3)
    with pytest.raises(ValueError, match="--modality"):
        IngestConfig(source="x", out="y", follow=True, modality="image")
    with pytest.raises(ValueError, match="--format"):
        IngestConfig(source="x", out="y", follow=True, format="list")
