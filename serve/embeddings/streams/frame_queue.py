"""A bounded queue of frames from a live source, which cannot wait for the encoder."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Literal

from serve.embeddings.contract import Decoded

QUEUE_BYTES = 8_388_608
"""Bytes of frames that may wait in one stream at most."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a stream.

    Attributes:
        number: position among the source's frames, without skipped but with dropped ones.
        time_s: seconds in the source's time.
        arrived_s: when the frame arrived, by the event loop's clock.
        content: an encoded picture, or one [H, W, C] that is fitted to the model.
    """

    number: int
    time_s: float
    arrived_s: float
    content: bytes | Decoded

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes


class FrameQueue:
    """Frames in order of arrival; if it is full, one frame is dropped and counted.

    Args:
        size: frames that may wait at most.
        drop: which frame to drop.
        fps: skip frames whose times follow one another faster than this rate; None skips none.

    Attributes:
        received: frames that came and were not skipped.
        dropped: how many of these were dropped.
        skipped: frames that came too soon.
    """

    def __init__(self, size: int, drop: Literal["oldest", "newest"], fps: float | None) -> None:
        self._size, self._drop_newest = size, drop == "newest"
        self._period_s = 1 / fps if fps else None
        self._due_s: float | None = None
        self._frames: deque[Frame] = deque()
        self._changed = asyncio.Event()
        self._closed = False
        self._bytes = 0
        self.received = self.dropped = self.skipped = 0

    def put(self, time_s: float, arrived_s: float, content: bytes | Decoded) -> None:
        """Adds a frame, unless it comes too soon or is the one to drop."""
        if self._is_too_soon(time_s):
            self.skipped += 1
            return
        frame = Frame(self.received, time_s, arrived_s, content)
        self.received += 1
        while self._frames and self._is_full(frame):
            self.dropped += 1
            if self._drop_newest:
                return
            self._take()
        self._frames.append(frame)
        self._bytes += frame.size
        self._changed.set()

    def close(self) -> None:
        """Says that no more frames will come."""
        self._closed = True
        self._changed.set()

    async def get(self) -> Frame | None:
        """Waits for the next frame and returns it; None at the end."""
        while not self._frames:
            if self._closed:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._take()

    def _take(self) -> Frame:
        frame = self._frames.popleft()
        self._bytes -= frame.size
        return frame

    def _is_full(self, frame: Frame) -> bool:
        return len(self._frames) >= self._size or self._bytes + frame.size > QUEUE_BYTES

    def _is_too_soon(self, time_s: float) -> bool:
        if self._period_s is None:
            return False
        slack_s = self._period_s / 20  # times are rounded
        if self._due_s is not None and 0 < self._due_s - time_s - slack_s < self._period_s:
            return True
        # On the grid of the rate where the source keeps up, else (or if time jumped) from here.
        late = self._due_s is None or abs(time_s - self._due_s) >= self._period_s
        self._due_s = (time_s if late else self._due_s or 0.0) + self._period_s
        return False
