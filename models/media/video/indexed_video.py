"""Frames of a whole video file by number: how many there are, their times, and their pictures.

Frames are numbered in the order in which a decoder returns them from the beginning of the file,
which is what FFmpeg shows. For ordinary files the packets give the numbers without decoding.
Decoding then starts at the last key frame that is shown no later than the wanted frame, because
frames that are stored after a key frame but shown before it need the group before. If the packets
cannot be trusted, the file is decoded once to number the frames, and again up to the last wanted
frame.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import av

from models.media.video.containers import VideoError, pixel_aspect
from models.media.video.video_reader import (
    RESTART_PERIODS,
    Damage,
    FrameClock,
    FrameDecoder,
    Packet,
    frame_period,
    is_shown,
    read_packets,
    stamp_of,
)


class IndexedVideo:
    """Frames of an open file by number. Keeps its encoded packets and one decoded frame.

    Args:
        container: from PyAV, at its beginning.
        stream: its video stream.
        most: refuse files of more frames.

    Attributes:
        aspect: width / height of a pixel.

    Raises:
        VideoError: `too_many_frames`, `decode_error`.
    """

    def __init__(self, container: Any, stream: av.VideoStream, *, most: int | None = None) -> None:
        self._container, self._stream, self._most = container, stream, most
        self._period = frame_period(stream)
        self.aspect = pixel_aspect(stream)
        damage = Damage()
        self._packets: list[Packet] = []
        shown = 0
        for packet in read_packets(container, stream, damage):
            self._packets.append(packet)
            shown += is_shown(packet)
            self._check_number(shown)
        if damage.places:
            raise VideoError("decode_error", damage.first)
        self._decoder, self._next = FrameDecoder(stream, damage), 0
        self._times: list[Fraction] = []
        self._stamps = self._stamps_of_packets()
        if not self._stamps:
            self._times = self._decoded_times()
            if not self._times and damage.first:
                raise VideoError("decode_error", damage.first)

    def __len__(self) -> int:
        """Returns the number of frames."""
        return len(self._stamps or self._times)

    @property
    def times(self) -> list[Fraction]:
        """Time of each frame in seconds after the first, ascending."""
        base = self._stream.time_base or Fraction(1, av.time_base)
        return self._times or [(stamp - self._stamps[0]) * base for stamp in self._stamps]

    @property
    def duration(self) -> Fraction:
        """Seconds from the first frame to the end of the last frame."""
        if len(self._times) > 1:
            return self._times[-1] + _step(self._times, self._period)
        lengths = [packet.duration for packet in self._packets if packet.duration]
        shown = lengths[-1] * (self._stream.time_base or 0) if lengths else 0
        return self.times[-1] + (shown or self._period) if len(self) else Fraction(0)

    def frames(self, numbers: Iterable[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Decodes some frames, and only those others that they depend on.

        Args:
            numbers: frame numbers in any order, repeats allowed.

        Yields:
            (number, frame) once for every number, ascending. No reference to the frame is kept.

        Raises:
            VideoError: `no_such_frame`, before the first frame; `decode_error` for a damaged frame.
        """
        wanted = sorted(set(numbers))
        if bad := [number for number in wanted if not 0 <= number < len(self)]:
            raise VideoError("no_such_frame", f"{bad[:3]} of {len(self)} frames")
        found = 0
        for number, frame in self._by_stamp(wanted) if self._stamps else ():
            if frame is None:  # a packet gave no frame, so packets cannot be trusted
                self._stamps, self._times = [], self._decoded_times()
                break
            found += 1
            yield number, frame
        if found < len(wanted):
            yield from self._in_order(wanted[found:])

    def _check_number(self, frames: int) -> None:
        if self._most is not None and frames > self._most:
            raise VideoError("too_many_frames", f"the video holds more than {self._most} frames")

    def _stamps_of_packets(self) -> list[int]:
        """Returns the sorted stamps of all frames from their packets; none if these seem wrong."""
        if any(_is_hidden(self._stream.codec_context.name, p) for p in self._packets):
            return []
        stamps = [stamp_of(packet) for packet in self._packets if is_shown(packet)]
        known = [stamp for stamp in stamps if stamp is not None]
        if not known or len(set(known)) < len(stamps):
            return []
        if not self._begins_well(min(known)) or self._overlaps():
            return []
        # If the decoder reorders frames but times are in decoding order, the times are wrong.
        reorders = self._stream.codec_context.has_b_frames
        if reorders and (self._container.format.name == "avi" or known == sorted(known)):
            return []
        return sorted(known)

    def _overlaps(self) -> bool:
        """Whether a frame after a key frame is shown before a frame stored ahead of that key frame.

        This occurs where files were joined.
        """
        latest = before_key = -math.inf
        for packet in filter(is_shown, self._packets):
            stamp = stamp_of(packet) or 0
            before_key = latest if packet.is_keyframe else before_key
            if stamp < before_key:
                return True
            latest = max(latest, stamp)
        return False

    def _begins_well(self, earliest: int) -> bool:
        """Whether the first frame can be decoded; its key frame may have been cut off."""
        first = self._packets[0]
        whole = first.is_keyframe and is_shown(first) and stamp_of(first) == earliest
        if whole and "mp4" in self._container.format.name:  # its key frames are marked reliably
            return True
        frame, _ = next(self._decoded(0), (None, False))
        return frame is not None and frame.pts == earliest

    def _decoded(self, first: int) -> Iterator[tuple[av.VideoFrame, bool]]:
        """Restarts the decoder and yields (frame, whether it is good) from a packet on."""
        self._decoder.restart()
        for place in range(first, len(self._packets) + 1):
            self._next = place + 1
            packet = self._packets[place] if place < len(self._packets) else None
            for frame, good, _ in self._decoder.decode(packet):
                yield frame, good

    def _decoded_times(self) -> list[Fraction]:
        """Decodes all frames and returns their times, which never go back."""
        clock, times = FrameClock(self._container, self._stream), list[Fraction]()
        offset = Fraction(0)
        for frame, _ in self._decoded(0):
            self._check_number(len(times) + 1)
            stamp, base = clock.stamp(frame), clock.base(frame)
            follows = times[-1] + _step(times, self._period) if times else Fraction(0)
            time = stamp * base + offset if stamp is not None and base else follows
            if not times:
                offset, time = offset - time, Fraction(0)
            elif frame.key_frame and times[-1] - time > RESTART_PERIODS * self._period:
                offset, time = offset + follows - time, follows  # another film begins here
            times.append(max(time, times[-1] if times else time))
        if times and not times[-1]:  # the file has no times
            times = [number * self._period for number in range(len(times))]
        return times

    def _in_order(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yields frames by their position in the decoder's output."""
        remaining = set(wanted)
        for number, (frame, good) in enumerate(self._decoded(0)):
            if number in remaining:
                if not good:
                    raise self._lost(number)
                remaining.remove(number)
                yield number, frame
            if not remaining:
                return
        raise self._lost(min(remaining))

    def _by_stamp(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame | None]]:
        """Yields frames by their stamps; None for one missing from undamaged data."""
        keys = [place for place, packet in enumerate(self._packets) if packet.is_keyframe]
        key_stamps = [stamp_of(self._packets[key]) or 0 for key in keys]
        frames: Iterator[tuple[av.VideoFrame, bool]] = iter(())
        for number in wanted:
            stamp = self._stamps[number]
            place = bisect.bisect_right(key_stamps, stamp) - 1
            key = keys[place] if place >= 0 else 0
            if number == wanted[0] or key > self._next:  # nearer than the current position
                frames = self._decoded(key)
            yield number, self._until(number, frames)

    def _until(
        self, number: int, frames: Iterator[tuple[av.VideoFrame, bool]]
    ) -> av.VideoFrame | None:
        """Decodes up to a frame; returns None if later frames come without it."""
        for frame, good in frames:
            if frame.pts is not None and frame.pts >= self._stamps[number]:
                if frame.pts == self._stamps[number] and good:
                    return frame
                break
        if self._decoder.damage.places:
            raise self._lost(number)
        return None

    def _lost(self, number: int) -> VideoError:
        why = self._decoder.damage.first or "the decoder does not give it"
        return VideoError("decode_error", f"frame {number} of {len(self)}: {why}")


def _step(times: list[Fraction], period: Fraction) -> Fraction:
    """Returns seconds between the last two frames; `period` if there is no such step."""
    return times[-1] - times[-2] if len(times) > 1 and times[-1] > times[-2] else period


def _is_hidden(codec: str, packet: Packet) -> bool:
    """Whether a VP8 or VP9 packet holds a picture that is never shown, only referred to."""
    if codec not in ("vp8", "libvpx", "vp9", "libvpx-vp9"):
        return False
    head = bytes(memoryview(packet)[:1])[0]
    if codec in ("vp8", "libvpx"):
        return not head >> 4 & 1  # show_frame (RFC 6386, 9.1)
    profile_3, shows_known, shown = head >> 4 & 3 == 3, head >> 3 & 1, head >> 1 & 1
    superframe = bytes(memoryview(packet)[-1:])[0] >> 5 == 0b110  # its last frame is shown
    return not (profile_3 or shows_known or shown or superframe)
