"""Reads the frames of a video in order, with their times, and records what was lost.

All reading of video uses this: ingest of files, live sources, requests and streams. One frame is
held at a time, for any length. Damage is never hidden: after a broken packet a decoder goes on with
pictures that depend on missing data, so all frames up to the next key frame are dropped, and the
first good frame is marked as not following the one before.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import av

from models.media.video.containers import VideoError, declared_seconds, describe, pixel_aspect

DEFAULT_RATE = 25  # frames a second of a stream that does not state it
READ_TRIES = 8  # demuxer errors in a row after which reading stops
SHORTFALL = Fraction(1, 2)  # a file that ends this many seconds early counts as truncated
RESTART_PERIODS = 2.5  # a key frame this many frames back is a new start; less is clock jitter

TS_WRAP = 2**33  # ticks until the clock of MPEG-TS wraps around

Loss = tuple[str, str]
Packet: TypeAlias = "av.Packet[Any]"  # generic in its stub only


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedFrame:
    """One decoded frame.

    Attributes:
        frame: as decoded, in any pixel format, not rotated.
        time: seconds since the first frame.
        duration: seconds for which it is shown according to the file; a guess if it does not say.
        aspect: width / height of one pixel.
        index: number of the frame in the source, in the order shown; lost frames are counted.
        after_loss: whether something is missing between the frame before and this one.
    """

    frame: av.VideoFrame
    time: Fraction
    duration: Fraction
    aspect: Fraction
    index: int
    after_loss: bool


@dataclass(slots=True)
class Damage:
    """Number of damaged places, and the first message; a live stream may be damaged for days."""

    places: int = 0
    first: str = ""

    def add(self, text: str, places: int = 1) -> None:
        """Adds damaged places; only the first message of all is kept."""
        self.first = self.first or text
        self.places += places

    def take(self, later: Damage) -> None:
        """Moves later damage into this record and empties the other."""
        self.add(later.first, later.places)
        later.places, later.first = 0, ""


def stamp_of(packet: Packet) -> int | None:
    """Returns when a packet's frame is shown, in the stream's time base; None if unknown."""
    return packet.pts if packet.pts is not None else packet.dts


def is_shown(packet: Packet) -> bool:
    """Whether a packet's frame is shown; others are only decoded for frames that need them."""
    return bool(packet.size) and not packet.is_discard


def frame_period(stream: av.VideoStream) -> Fraction:
    """Returns seconds from frame to frame according to the header; a guess if it does not say."""
    return 1 / Fraction(stream.average_rate or stream.guessed_rate or DEFAULT_RATE)


def read_packets(container: Any, stream: av.VideoStream, damage: Damage) -> Iterator[Packet]:
    """Yields the packets of a stream in decoding order, as far as a damaged file can be read.

    Args:
        container: from PyAV, or an object like it.
        stream: a stream of the container.
        damage: records the demuxer's errors.
    """
    failures, clock = 0, TransportClock(container)
    while failures < READ_TRIES:
        try:
            for packet in container.demux(stream):
                failures = 0
                clock.correct(packet)
                if packet.size:  # an empty packet would end the decoder, and AVI has some
                    yield packet
            return
        except av.FFmpegError as error:
            failures += 1
            damage.add(describe(error))


class TransportClock:
    """Corrects the 33-bit times of MPEG-TS to be as near as possible to the packet before.

    They wrap around every 26.5 hours. FFmpeg takes every step back for a wrap-around and adds 2^33,
    also when a source has started again or its clock was set back.

    Args:
        container: of the packets; other formats are not changed.
    """

    def __init__(self, container: Any) -> None:
        self._wraps = container.format.name == "mpegts"
        self._last: int | None = None

    def correct(self, packet: Packet) -> None:
        """Corrects the next packet of a stream."""
        if not self._wraps or packet.dts is None:
            return
        if self._last is not None:
            turns = round((self._last - packet.dts) / TS_WRAP) * TS_WRAP
            packet.dts += turns
            packet.pts = packet.pts if packet.pts is None else packet.pts + turns
        self._last = packet.dts


class FrameDecoder:
    """Decodes packets to frames in the order shown, and tells which depend on damaged data.

    Args:
        stream: the stream whose decoder is used.
        damage: records the damage that is found.
    """

    def __init__(self, stream: av.VideoStream, damage: Damage) -> None:
        self._stream, self.damage = stream, damage
        self._broken = False

    def decode(self, packet: Packet | None) -> Iterator[tuple[av.VideoFrame, bool, bool]]:
        """Yields (frame, whether it is good, whether it is the first good one after damage).

        Args:
            packet: the next packet; None makes the decoder return all that it holds.
        """
        for frame in self._decoded(packet):
            if frame.is_corrupt and not self._broken:
                self.damage.add("the decoder calls a frame corrupt")
                self._broken = True
            good = not self._broken or (frame.key_frame and not frame.is_corrupt)
            first, self._broken = self._broken and good, self._broken and not good
            yield frame, good, first

    def _decoded(self, packet: Packet | None) -> list[av.VideoFrame]:
        if packet is not None and packet.is_corrupt:
            self.damage.add("the container calls a packet corrupt")
            self._broken = True
            return []
        try:
            return self._stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            self.damage.add(describe(error))
            self._broken = True
            return []

    def restart(self) -> None:
        """Resets the decoder; the next packet should hold a key frame."""
        self._stream.codec_context.flush_buffers()
        self._broken = False


class FrameClock:
    """Tells the time of each frame that a decoder returns, in the order in which they are shown.

    If presentation times go back more often than decoding times, they belong to another order, as
    when an AVI was copied into another container. Then decoding times are used, which is FFmpeg's
    rule. AVI itself has only decoding times.

    Args:
        container: the frames' container.
        stream: the frames' stream.
    """

    def __init__(self, container: Any, stream: av.VideoStream) -> None:
        self._decoding_only = container.format.name == "avi"
        self._base = stream.time_base
        self._last: dict[str, int | None] = {"pts": None, "dts": None}
        self._faults = {"pts": 0, "dts": 0}

    def stamp(self, frame: av.VideoFrame) -> int | None:
        """Returns a frame's time in its time base; None if unknown. Call it once for each frame."""
        for name, value in (("pts", frame.pts), ("dts", frame.dts)):
            last = self._last[name]
            if value is not None:
                self._faults[name] += last is not None and value <= last
                self._last[name] = value
        doubtful = self._decoding_only or self._faults["pts"] > self._faults["dts"]
        return frame.dts if doubtful or frame.pts is None else frame.pts

    def base(self, frame: av.VideoFrame) -> Fraction | None:
        """Returns a frame's time base; frames from flushing a decoder have none of their own."""
        return frame.time_base or self._base


class Restarts:
    """Detects where a source starts again: at a key packet whose decoding time goes back.

    Args:
        period: seconds from frame to frame.
        max_gap: seconds; a larger step back counts at any packet.
    """

    def __init__(self, period: Fraction | float, max_gap: Fraction | float) -> None:
        self._slack, self._max_gap = float(RESTART_PERIODS * period), float(max_gap)
        self._last = -math.inf

    def at(self, packet: Packet) -> bool:
        """Takes the next packet and returns whether a new timeline begins with it."""
        if packet.dts is None or packet.time_base is None:
            return False
        decoded = float(packet.dts * packet.time_base)
        back, self._last = self._last - decoded, decoded
        return back > self._max_gap or (packet.is_keyframe and back > self._slack)


class FrameReader:
    """Iterates once over the frames of an open stream; after that, `losses` is complete.

    Args:
        container: from PyAV.
        stream: its video stream.
        max_seconds: stop after this time; None never stops.
        max_pixels: refuse larger frames.
        max_gap: seconds. A time further back than this starts a new timeline, as does a key frame
            with which the source starts again. Any other step back is an error, and the frame gets
            the time of the frame before.
        times: sorted presentation times of all packets (`presentation_times`), so that frames keep
            their numbers across damage; None counts the frames that are decoded.
        start: the file's time that counts as 0, seconds; None takes that of the first frame.
    """

    def __init__(
        self,
        container: Any,
        stream: av.VideoStream,
        *,
        max_seconds: float | None,
        max_pixels: int,
        max_gap: float,
        times: list[int] | None = None,
        start: Fraction | None = None,
    ) -> None:
        self._container, self._stream, self._times = container, stream, times
        self._clock = FrameClock(container, stream)
        self._limit = None if max_seconds is None else Fraction(max_seconds)
        self._max_pixels = max_pixels
        self._max_gap = Fraction(max_gap)
        self._period = self._step = frame_period(
            stream
        )  # the step is from the frame before the last one
        self._aspect = pixel_aspect(stream)
        self._start = start
        self._last = Fraction(0)
        self._end = Fraction(0)
        self._count, self._index, self._delay = 0, -1, 0
        self._damage = Damage()
        self._open_damage = Damage()  # since the last good frame
        self._last_damage = Damage()  # since the last good frame before the decoder was flushed
        self._behind_damage = 0  # packets since then
        self._dropped = self._out_of_order = 0
        self._after_loss = self._begins_anew = self._too_long = False

    def __iter__(self) -> Iterator[TimedFrame]:
        """Yields frames in the order in which they are shown.

        Raises:
            VideoError: `too_many_pixels`, if a later frame is larger than the header says.
        """
        decoder = FrameDecoder(self._stream, self._open_damage)
        restarts = Restarts(self._period, self._max_gap)
        packets = read_packets(self._container, self._stream, self._open_damage)
        for packet in itertools.chain(packets, (None,)):
            if packet is None:
                self._last_damage = dataclasses.replace(self._open_damage)
            else:
                self._behind_damage += bool(self._open_damage.places)
                self._begins_anew = restarts.at(packet) or self._begins_anew
            for frame, good, first in decoder.decode(packet):
                if not good:
                    self._dropped += 1
                    continue
                self._after_loss = self._after_loss or first
                timed = self._timed(frame)
                if self._too_long:
                    return
                if timed is not None:
                    yield timed

    def _timed(self, frame: av.VideoFrame) -> TimedFrame | None:
        if frame.width * frame.height > self._max_pixels:
            size = f"{frame.width}x{frame.height}"
            raise VideoError("too_many_pixels", f"{size} is over {self._max_pixels} pixels")
        stamp, base = self._clock.stamp(frame), self._clock.base(frame)
        follows = self._last + self._step if self._count else Fraction(0)
        seconds = stamp * base if stamp is not None and base else (self._start or 0) + follows
        self._start = seconds if self._start is None else self._start
        time = Fraction(seconds - self._start)
        if self._goes_back(frame, time):
            self._out_of_order += 1
            time = self._last
        if self._limit is not None and time > self._limit:
            self._too_long = True
            return None
        self._index = self._next_index(stamp)
        duration = frame.duration * base if frame.duration and base else self._period
        self._step = time - self._last if time > self._last else self._step
        self._last, self._count, self._end = time, self._count + 1, time + duration
        self._damage.take(self._open_damage)
        self._behind_damage = 0
        after_loss, self._after_loss = self._after_loss, False
        return TimedFrame(
            frame=frame,
            time=time,
            duration=duration,
            aspect=self._aspect,
            index=self._index,
            after_loss=after_loss,
        )

    def _goes_back(self, frame: av.VideoFrame, time: Fraction) -> bool:
        """Whether a time is impossible, because a decoder returns frames in the order shown."""
        if time >= self._last or time < self._last - self._max_gap:
            return False
        if self._begins_anew and frame.key_frame:
            self._begins_anew = False
            return False
        return True

    def _next_index(self, stamp: int | None) -> int:
        if self._times is None or stamp is None:
            return self._index + 1
        rank = bisect.bisect_left(self._times, stamp)
        if self._count == 0 and self._container.format.name == "avi":
            self._delay = rank  # of the decoder, in frames
        return rank - self._delay

    @property
    def start(self) -> Fraction | None:
        """The file's time that counts as 0, seconds; None before the first frame."""
        return self._start

    @property
    def unreadable(self) -> str:
        """Why reading stopped early; empty at the file's end, even if the last packet is cut."""
        if not self._count:
            return self._open_damage.first or "there is no frame that can be shown"
        is_cut = self._last_damage.places == 1 and not self._behind_damage
        return "" if is_cut else self._last_damage.first

    @property
    def losses(self) -> list[Loss]:
        """(reason, detail) of everything that is missing; the same whenever it is read."""
        found = []
        if self._damage.places:
            detail = f"damage in {self._damage.places} places: {self._damage.first}"
            found.append(("corrupt", f"{detail}; {self._dropped} frames dropped behind it"))
        if self._out_of_order:
            found.append(("out_of_order", f"{self._out_of_order} frames with times that go back"))
        if self._too_long:
            found.append(("too_long", f"cut after {float(self._limit or 0):g} s"))
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
    """Returns the sorted times at which packets of a stream are shown, without decoding.

    Reads the whole file, so the container must be opened again for decoding.
    """
    # The pass that decodes finds the same damage and reports it.
    shown = filter(is_shown, read_packets(container, stream, Damage()))
    return sorted(stamp for packet in shown if (stamp := stamp_of(packet)) is not None)
