"""Reads the packets of a live source in a thread, so that slow reads and slow writes do not block.

A `Connection` takes the place of PyAV's container in `models.media.video.video_reader.FrameReader`.
Its queue is limited in bytes; when it is full, the thread waits, and the source with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av

from models.media.video.containers import VideoError, choose_stream, describe
from models.media.video.video_reader import Packet, Restarts, TransportClock, stamp_of
from pipelines.config.ingest import IngestConfig
from pipelines.runtime.uris import public_name

QUEUE_BYTES = 32 * 2**20
DRAIN_S = 2.0
TICK_S = 0.2  # the longest wait without a look at the clock
POLL_S = 0.05  # for more of a file that grows
HEAD_BYTES = 4096  # distinguish a growing file from the next one of that name
PLAYLISTS = ("hls", "dash")  # a new connection repeats packets of the last one

Kind = Literal["url", "file", "pipe"]


class SourceError(ValueError):
    """A live source that cannot be opened."""


def kind_of(source: str, container_format: str = "") -> Kind:
    """Returns how a source is read: by FFmpeg, as a growing file, or as a pipe.

    Raises:
        SourceError: There is no such file, or it is a folder.
    """
    if source == "-":
        return "pipe"
    if "://" in source or container_format in PLAYLISTS:
        return "url"
    try:
        mode = Path(source).stat().st_mode
    except OSError as error:
        if container_format:  # a device may be no file
            return "url"
        raise SourceError(f"{source}: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise SourceError(f"{source} is a folder, not a stream")
    if stat.S_ISREG(mode):
        return "file"
    return "url" if container_format else "pipe"


def file_identity(path: str, known: str = "") -> str:
    """Returns a text that stays the same while a file grows but differs for a new file.

    Args:
        path: Path of the file.
        known: An earlier result; returned again if the file is the same.
    """
    length = int(known.split("-")[2]) if known.startswith("file-") else HEAD_BYTES
    with Path(path).open("rb") as file:
        head = file.read(length)
        digest = hashlib.blake2b(head, digest_size=8).hexdigest()
        return f"file-{os.fstat(file.fileno()).st_ino}-{len(head)}-{digest}"


def describe_error(error: Exception) -> str:
    """Returns an error on one line, without an address that may hold a password."""
    return str(error) if isinstance(error, SourceError | VideoError) else describe(error)


class GrowingFile:
    """A file that is still written: at its end `read` waits for more until `ended` returns True."""

    def __init__(self, file: io.FileIO, ended: Callable[[], bool]) -> None:
        self._file, self._ended = file, ended

    def read(self, size: int) -> bytes:
        """Returns at least one byte, or no byte at the end."""
        while not (data := self._file.read(size)):
            if self._ended():
                return b""
            time.sleep(POLL_S)
        return data


class Connection:
    """One opening of a source.

    Args:
        cfg: the ingest configuration.
        tick: Called at every packet and at least every `TICK_S`; returning True ends the
            connection.

    Attributes:
        kind: how the source is read.
        format: PyAV's, once it is open.
        arrived: when the packet last handed out came, seconds since 1970.
        lag: how long it had waited here, seconds.
        error: why it broke; None while it has not, and at a regular end.
    """

    def __init__(self, cfg: IngestConfig, tick: Callable[[], bool]) -> None:
        self.kind = kind_of(cfg.source, cfg.live.format)
        self.arrived, self.lag = time.time(), 0.0
        self.error: Exception | None = None
        self.format: Any = None
        self.duration = None  # a live stream has no known duration
        self._cfg, self._tick = cfg, tick
        self._changed = threading.Condition()
        self._packets: deque[tuple[float, Packet]] = deque()
        self._bytes = 0
        self._container: Any = None
        self._stream: av.VideoStream | None = None
        self._ending = self._ended = self._closed = False
        # A daemon: it may hang in a read that no signal ends.
        self._thread = threading.Thread(target=self._run, name="live-source", daemon=True)
        self._thread.start()

    def open(self) -> av.VideoStream | None:
        """Waits for the video stream; returns None if `tick` ended the wait.

        Raises:
            SourceError: The source cannot be opened.
        """
        while self._stream is None and not self._ended:
            if self._tick():
                return None
            with self._changed:
                if self._stream is None and not self._ended:
                    self._changed.wait(TICK_S)
        if self._stream is None:
            text = describe_error(self.error) if self.error else "it ended before it began"
            raise SourceError(f"{public_name(self._cfg.source)}: {text}") from self.error
        return self._stream

    def demux(self, stream: av.VideoStream) -> Iterator[Packet]:
        """Yields the packets as they come, and an empty one at the end.

        After `tick` returned True, packets that have arrived are still yielded, for at most
        `DRAIN_S`.
        """
        until = math.inf
        while time.monotonic() < until:
            if not self._ending and self._tick():
                self._ending, until = True, time.monotonic() + DRAIN_S
            with self._changed:
                if not self._packets and not self._ended:
                    self._changed.wait(TICK_S)
                if not self._packets:
                    if self._ended:
                        break
                    continue
                self.arrived, packet = self._packets.popleft()
                self._bytes -= packet.size
                self._changed.notify_all()
            self.lag = time.time() - self.arrived
            yield packet
        flush: Packet = av.Packet()
        if stream.time_base is not None:
            flush.time_base = stream.time_base
        yield flush

    def close(self) -> None:
        """Ends the thread and closes the container, now or when a pending read returns."""
        with self._changed:
            self._closed = True
            self._packets.clear()
            self._changed.notify_all()
            if self._ended and self._container is not None:
                self._container.close()

    def _run(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                self._container = self._open(stack)
                stream = choose_stream(self._container, self._cfg.video.max_pixels)
                with self._changed:
                    self.format, self._stream = self._container.format, stream
                    self._changed.notify_all()
                self._pump(stream)
        except (av.FFmpegError, OSError, ValueError) as error:
            self.error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
                if self._closed and self._container is not None:  # else its streams are in use
                    self._container.close()

    def _open(self, stack: contextlib.ExitStack) -> Any:
        source, live = self._cfg.source, self._cfg.live
        options = dict(option.split("=", 1) for option in live.options)
        if self.kind == "url":
            if source.startswith("rtsp"):  # by UDP, what does not fit into a buffer is lost
                options.setdefault("rtsp_transport", "tcp")
            container: Any = av.open(
                source,
                "r",
                format=live.format or None,
                options=options,
                timeout=(live.open_seconds, live.read_seconds),
                metadata_errors="replace",
            )
            if container.size > 0 and container.format.name not in PLAYLISTS:
                container.close()
                raise SourceError(f"a file of {container.size} bytes: ingest it without --follow")
            return container
        standard_input = source == "-"
        name = sys.stdin.fileno() if standard_input else source
        file = stack.enter_context(io.FileIO(name, closefd=not standard_input))
        growing = (
            GrowingFile(file, lambda: self._ending or self._closed) if self.kind == "file" else file
        )
        return av.open(
            growing, "r", format=live.format or None, options=options, metadata_errors="replace"
        )

    def _pump(self, stream: av.VideoStream) -> None:
        last, clock = time.monotonic(), TransportClock(self._container)
        for packet in self._container.demux():  # of all streams: sound alone must not look alive
            if packet.stream_index != stream.index:
                if self.kind == "url" and time.monotonic() - last > self._cfg.live.read_seconds:
                    raise TimeoutError("sound came, but no video")
                continue
            last = time.monotonic()
            if not packet.size:
                continue
            clock.correct(packet)
            with self._changed:
                while self._bytes > QUEUE_BYTES and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                self._packets.append((time.time(), packet))
                self._bytes += packet.size
                self._changed.notify_all()
            if self._ending:
                return


def from_position(
    packets: Iterable[Packet],
    position: Fraction | None,
    jumps: int = 0,
    restarts: Restarts | None = None,
) -> Iterator[Packet]:
    """Leaves out the packets before a time by the source's clock, but not what decoding needs.

    Args:
        packets: of one video stream.
        position: seconds; None begins with the first key frame.
        jumps: how often the clock went back, before that time was reached.
        restarts: tells when it does; None never.
    """
    packets = iter(packets)
    group: list[Packet] = []  # from the last key frame on
    size = 0
    for packet in packets:
        if not packet.size:  # the end
            yield packet
            return
        jumps -= restarts is not None and restarts.at(packet)
        if packet.is_keyframe or size > QUEUE_BYTES:
            group, size = [], 0
        if not (group or packet.is_keyframe):
            continue
        group.append(packet)
        size += packet.size
        stamp = stamp_of(packet)
        late = position is None or stamp is None or stamp * packet.time_base >= position
        if jumps < 0 or (jumps == 0 and late):
            yield from group
            break
    group.clear()
    yield from packets
