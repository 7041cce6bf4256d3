"""Frames of a video as they come, with their times, and a record of what could not be had.

Holds one frame at a time, whatever the length. Damage is never papered over: a decoder goes on after
a broken packet with pictures built on what is missing, so all frames up to the next key frame are
dropped, and the first good one says that it does not follow the last.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av

from models.video_decode import VideoError, declared_seconds, describe, pixel_aspect

DEFAULT_RATE = 25  # of a stream that states none
READ_TRIES = 8  # demuxer errors in a row before the rest is given up
SHORTFALL = Fraction(1, 2)  # seconds short of what the header says that count as truncated

Loss = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedFrame:
    """One decoded frame.

    Attributes:
        frame: as decoded: any pixel format, not rotated.
        time: seconds since the first frame.
        duration: seconds it is shown, as the file says; a guess where it does not.
        aspect: width / height of one pixel.
        index: number of the frame in the source, in the order shown; lost frames are counted.
        after_loss: something is missing between this frame and the one before it.
    """

    frame: av.VideoFrame
    time: Fraction
    duration: Fraction
    aspect: Fraction
    index: int
    after_loss: bool


@dataclass(slots=True)
class _Damage:
    """How often, and what came first: a live stream may be damaged for days."""

    places: int = 0
    first: str = ""

    def add(self, text: str, places: int = 1) -> None:
        self.first = self.first or text
        self.places += places

    def join(self, later: _Damage) -> None:
        self.add(later.first, later.places)


class FrameReader:
    """Iterates once over the frames of an open stream; `losses` is complete after that.

    Args:
        container: from PyAV.
        stream: its video stream.
        max_seconds: stop after this time.
        max_pixels: of one frame.
        max_gap: a timestamp further back than this starts a new timeline; one less far back is
            out of order, and its frame dropped.
        times: presentation times of all packets, sorted (`presentation_times`), so that frames keep
            their numbers across damage; None counts the frames that come.
        start: time by the file that counts as 0, seconds; None takes that of the first frame.
    """

    def __init__(
        self,
        container: Any,
        stream: av.VideoStream,
        *,
        max_seconds: float,
        max_pixels: int,
        max_gap: float,
        times: list[int] | None = None,
        start: Fraction | None = None,
    ) -> None:
        self._container, self._stream, self._times = container, stream, times
        # AVI says only in which order to decode; the frames come out in the order shown.
        self._avi = container.format.name == "avi"
        self._limit, self._max_pixels = Fraction(max_seconds), max_pixels
        self._max_gap = Fraction(max_gap)
        rate = stream.average_rate or stream.guessed_rate or DEFAULT_RATE
        self._period = 1 / Fraction(rate)
        self._aspect = pixel_aspect(stream)
        self._start = start
        self._last = Fraction(0)
        self._end = Fraction(0)
        self._count, self._index, self._delay = 0, -1, 0
        self._open_damage, self._damage = (
            _Damage(),
            _Damage(),
        )  # the open one: since the last good frame
        self._dropped = self._out_of_order = 0
        self._too_long = False

    def __iter__(self) -> Iterator[TimedFrame]:
        """Yields frames in the order they are shown.

        Raises:
            VideoError: `too_many_pixels`, in mid-stream.
        """
        waiting = False
        for packet in self._packets():
            frames = self._decode(packet)
            waiting = waiting or frames is None
            for frame in frames or ():
                if frame.is_corrupt and not waiting:
                    self._open_damage.add("the decoder calls a frame corrupt")
                    waiting = True
                if waiting and (frame.is_corrupt or not frame.key_frame):
                    self._dropped += 1
                    continue
                timed = self._timed(frame, after_loss=waiting)
                if self._too_long:
                    return
                if timed is not None:
                    waiting = False
                    yield timed

    def _packets(self) -> Iterator[av.Packet[Any] | None]:
        """Yields packets to decode, and at the end what makes the decoder give all it holds."""
        failures = 0
        while failures < READ_TRIES:
            try:
                for packet in self._container.demux(self._stream):
                    failures = 0
                    yield packet
                return
            except av.FFmpegError as error:
                failures += 1
                self._open_damage.add(describe(error))
        yield None

    def _decode(self, packet: av.Packet[Any] | None) -> list[av.VideoFrame] | None:
        """Returns the frames that came out, None for damage."""
        if packet is not None and packet.is_corrupt:
            self._open_damage.add("the container calls a packet corrupt")
            return None
        try:
            return self._stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            self._open_damage.add(describe(error))
            return None

    def _timed(self, frame: av.VideoFrame, *, after_loss: bool) -> TimedFrame | None:
        if frame.width * frame.height > self._max_pixels:
            size = f"{frame.width}x{frame.height}"
            raise VideoError("too_many_pixels", f"{size} is over {self._max_pixels} pixels")
        stamp = frame.dts if frame.pts is None or self._avi else frame.pts
        base = frame.time_base or self._stream.time_base
        follows = self._last + self._period if self._count else Fraction(0)
        seconds = stamp * base if stamp is not None and base else (self._start or 0) + follows
        self._start = seconds if self._start is None else self._start
        time = Fraction(seconds - self._start)
        if self._last - self._max_gap <= time < self._last:
            self._out_of_order += 1
            return None
        if time > self._limit:
            self._too_long = True
            return None
        self._index = self._next_index(stamp)
        duration = frame.duration * base if frame.duration and base else self._period
        self._last, self._count, self._end = time, self._count + 1, time + duration
        self._damage.join(self._open_damage)
        self._open_damage = _Damage()
        return TimedFrame(
            frame=frame,
            time=time,
            duration=duration,
            aspect=self._aspect,
            index=self._index,
            after_loss=after_loss,
        )

    def _next_index(self, stamp: int | None) -> int:
        if self._times is None or stamp is None:
            return self._index + 1
        rank = bisect.bisect_left(self._times, stamp)
        if self._avi and self._count == 0:
            self._delay = rank  # of the decoder, in frames
        return rank - self._delay

    @property
    def start(self) -> Fraction | None:
        """Time by the file that counts as 0, seconds; None before the first frame."""
        return self._start

    @property
    def losses(self) -> list[Loss]:
        """(reason, detail) of all that is missing; a detail does not depend on when it is asked."""
        found = []
        if self._damage.places:
            detail = f"damage in {self._damage.places} places: {self._damage.first}"
            found.append(("corrupt", f"{detail}; {self._dropped} frames dropped behind it"))
        if self._out_of_order:
            found.append(("out_of_order", f"{self._out_of_order} frames with times that go back"))
        if self._too_long:
            found.append(("too_long", f"cut after {float(self._limit):g} s"))
        elif tail := self._lost_tail():
            found.append(("truncated", tail))
        return found

    def _lost_tail(self) -> str:
        declared = declared_seconds(self._container, self._stream)
        if declared is not None and declared - self._end > max(SHORTFALL, 2 * self._period):
            return f"{float(self._end):.3f} of {float(declared):.3f} s"
        if self._open_damage.places:
            return f"ends in damage after {float(self._end):.3f} s: {self._open_damage.first}"
        return ""


def presentation_times(container: Any, stream: av.VideoStream) -> list[int]:
    """Returns the times at which the packets of a stream are shown, sorted; decodes nothing.

    Reads the whole file, so the container must be opened anew for decoding.
    """
    times = []
    try:
        for packet in container.demux(stream):
            stamp = packet.pts if packet.pts is not None else packet.dts
            if packet.size and not packet.is_discard and stamp is not None:
                times.append(stamp)
    except av.FFmpegError:
        pass  # the decoding pass meets the same damage and reports it
    return sorted(times)
