"""Times that go back in files and live sources, and the choice among several streams."""

from __future__ import annotations

import dataclasses
import io
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest

from helpers.models.video_files import CYCLE, number_of, write_video
from helpers.pipelines.live_streams import Following, config, frames_in, numbers
from helpers.waiting import wait_until
from models.media.video.containers import choose_stream, open_video
from models.media.video.video_reader import FrameReader, Restarts, TimedFrame
from models.media.videos import RgbConverter
from pipelines.ingestion.live_connection import from_position


def film(frames: int = 30, container: str = "webm", codec: str = "libvpx", **more: Any) -> bytes:
    options = {"g": "10"} if codec == "libvpx" else {}
    written = write_video(
        io.BytesIO(), frames, container=container, codec=codec, options=options, **more
    )
    return bytes(written.getvalue())


def read(data: bytes) -> tuple[list[TimedFrame], list[int], list[tuple[str, str]]]:
    convert, frames, shown = RgbConverter(), [], []
    with open_video(io.BytesIO(data)) as (container, stream):
        reader = FrameReader(container, stream, max_seconds=60, max_pixels=10**6, max_gap=5)
        for frame in reader:
            frames.append(frame)
            shown.append(number_of(convert(frame.frame)))
        return frames, shown, reader.losses


@pytest.mark.parametrize("size", [(48, 64), (96, 128)])
def test_a_source_that_restarts_within_the_gap_loses_nothing(size: tuple[int, int]) -> None:
    frames, shown, losses = read(film() + film(20, size=size))
    assert losses == []
    assert shown == [*range(30), *range(20)]
    assert [frame.index for frame in frames] == list(range(50))
    times = [float(frame.time) for frame in frames]
    assert times[30:] == pytest.approx(times[:20])


def test_clock_jitter_loses_no_frame() -> None:
    """One time is wrong. Its frame gets the time of the frame before, and is counted."""
    data = film(6, "matroska", "mjpeg")
    block = b"\x81" + (100).to_bytes(2) + b"\x80"  # of track 1, at 100 ms, a key frame
    assert data.count(block) == 1
    data = data.replace(block, b"\x81" + (40).to_bytes(2) + b"\x80")
    frames, shown, losses = read(data)
    assert [reason for reason, _ in losses] == ["out_of_order"]
    assert len(shown) == 6
    assert [frame.index for frame in frames] == list(range(6))
    assert [round(frame.time * 1000) for frame in frames] == [0, 33, 67, 67, 133, 167]


def transport(frames: int, start: float) -> bytes:
    times = [Fraction(start) + Fraction(n, 30) for n in range(frames)]
    return bytes(write_video(io.BytesIO(), frames, times=times, container="mpegts").getvalue())


def live(data: bytes) -> list[float]:
    """Returns the times of frames of MPEG-TS, in seconds; ingest does not take such files."""
    with av.open(io.BytesIO(data)) as container:
        stream = choose_stream(container, 10**6)
        reader = FrameReader(container, stream, max_seconds=None, max_pixels=10**6, max_gap=5)
        return [float(frame.time) for frame in reader]


def test_an_mpeg_ts_clock_that_is_set_back_is_not_taken_for_a_wrap() -> None:
    """The last frame of the first part is incomplete: its packet ends where the second begins."""
    times = live(transport(30, 7200) + transport(30, 3600))
    assert len(times) >= 55
    assert times[:20] == pytest.approx([n / 30 for n in range(20)], abs=1e-3)
    assert times[-1] == pytest.approx(-3600 + 29 / 30, abs=1e-3)


def test_an_mpeg_ts_clock_that_wraps_around_goes_on() -> None:
    start = 2**33 / 90_000 - 1
    data = transport(60, start)
    with av.open(io.BytesIO(data), options={"correct_ts_overflow": "0"}) as container:
        stamps = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert max(stamps) - min(stamps) > 2**32  # it does wrap around
    assert live(data) == pytest.approx([n / 30 for n in range(60)], abs=1e-3)


@dataclasses.dataclass
class Packet:
    dts: int
    is_keyframe: bool = False
    size: int = 10
    time_base: Fraction = Fraction(1, 10)

    @property
    def pts(self) -> int:
        return self.dts


def test_restarts_are_steps_back_at_a_key_frame_or_beyond_the_gap() -> None:
    def seen(*packets: tuple[int, bool]) -> list[bool]:
        restarts = Restarts(period=Fraction(1, 10), max_gap=5.0)
        return [restarts.at(Packet(*packet)) for packet in packets]  # type: ignore[arg-type]

    assert seen((0, True), (1, False), (2, True)) == [False] * 3
    assert seen((30, True), (0, True), (1, False)) == [False, True, False]
    assert seen((30, True), (0, False)) == [False, False]  # a wrong time
    assert seen((30, True), (28, True)) == [False, False]  # a clock that shakes
    assert seen((80, True), (0, False)) == [False, True]


@pytest.mark.parametrize("jumps", [0, 1, 2])
def test_a_position_is_found_in_the_right_one_of_several_films(jumps: int) -> None:
    films = [Packet(n, n % 10 == 0) for _ in range(3) for n in range(40)]
    restarts = Restarts(Fraction(1, 10), math.inf)
    first = next(from_position(films, Fraction(25, 10), jumps, restarts))
    assert films.index(first) == 20
    assert first is films[20 + 40 * jumps]


def test_a_live_source_that_restarts_is_published_completely(tmp_path: Path) -> None:
    source, out = tmp_path / "a.webm", tmp_path / "out"
    source.write_bytes(film(30) + film(24, size=(96, 128)))
    with Following(config(source, out)):
        wait_until(lambda: frames_in(out) >= 10)
    assert numbers(out) == [*range(0, 30, 3), *range(0, 24, 3)]


def test_choice_among_streams() -> None:
    """Covers and stills do not count; then the default stream is taken, then the larger one."""

    @dataclasses.dataclass
    class Context:
        width: int = 64
        height: int = 48
        name: str = "h264"

    @dataclasses.dataclass
    class Stream:
        index: int
        disposition: Any
        frames: int = 0
        codec_context: Context = dataclasses.field(default_factory=Context)

    def chosen(*streams: Stream) -> int:
        group = type("Streams", (list,), {"video": list(streams)})(streams)
        container = type("Container", (), {"streams": group})
        return choose_stream(container, 10**6).index

    none, default = av.stream.Disposition(0), av.stream.Disposition.default
    cover = av.stream.Disposition.attached_pic
    assert chosen(Stream(0, none), Stream(1, none)) == 0
    assert chosen(Stream(0, cover | default), Stream(1, none)) == 1
    assert chosen(Stream(0, default, frames=1), Stream(1, none, frames=9)) == 1
    assert chosen(Stream(0, none), Stream(1, default)) == 1
    assert chosen(Stream(0, default), Stream(1, default, codec_context=Context(width=128))) == 1
    assert CYCLE > 30
