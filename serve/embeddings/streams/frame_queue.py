"""The bounded queue between a live source, which cannot wait, and the encoder, which may have to."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Literal

from serve.embeddings.contract import Pixels

QUEUE_BYTES = 8_388_608
"""Held for one stream at most, if its frames are large."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a stream.

    Attributes:
        number: counts all frames of the source that were not skipped, dropped ones too.
        time_s: in the source's time.
        arrived_s: when it came, by the event loop's clock.
        content: an encoded picture, or pixels [H, W, C] of the model's size.
    """

    number: int
    time_s: float
    arrived_s: float
    content: bytes | Pixels

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.nbytes


class FrameQueue:
    """Frames in order; when it is full, one is dropped and counted.

    Args:
        size: frames held at most.
        drop: which one goes.
        fps: skip frames that come sooner than this rate allows, by their own times.
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

    def put(self, time_s: float, arrived_s: float, content: bytes | Pixels) -> None:
        """Takes a frame, or does not."""
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
        """No more frames will come."""
        self._closed = True
        self._changed.set()

    async def get(self) -> Frame | None:
        """The next frame; None at the end."""
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
