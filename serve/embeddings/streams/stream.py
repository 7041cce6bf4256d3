"""Live streams: every few frames, the window of the latest frames is embedded.

The state of a stream (its queue, window and counters) belongs to the ingress replica that has its
connection. The windows of all streams share the batches of the embedder.

Shape legend: T frames of the window, H height, W width, C channels.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from models.image_size import height_width
from models.media.preprocessing import EncoderInput, Preprocessing
from serve.embeddings.contract import Decoded, EmbedFunction, Floats, ModelCard
from serve.embeddings.encoding import encode
from serve.embeddings.media.decode_pool import (
    DIED,
    DecodePool,
    DecoderGone,
    as_decoded,
    video_error,
)
from serve.embeddings.media.fitting import aspect_warning, same_patches
from serve.embeddings.media.loader import MediaLoader, to_parts
from serve.embeddings.settings import ServeSettings
from serve.embeddings.streams.frame_queue import Frame, FrameQueue
from serve.embeddings.streams.messages import StreamStart
from serve.ingress.errors import ApiError, server_error
from serve.ingress.websockets import to_text
from serve.replicas.calls import OtherModel
from serve.replicas.served_model import ServedModel
from serve.telemetry import LATENCY_BUCKETS_S

BAD_FRAMES = 16
"""A stream ends after this many frames in a row that cannot be decoded."""
RETRY_S = 0.1
"""Seconds until a window is embedded again, after the embedder's queue was full or no replica of
the stream's model was found."""

LOOKS = 10
"""Times that a replica of a stream's model is looked for, before the stream ends."""

LINGER_S = 5.0
"""Seconds to wait at the end for acknowledgements: if the socket closed at once, the client could
not send the last one."""

Send = Callable[[str], Awaitable[None]]


class StreamMetrics:
    """Metrics of the streams of one replica."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.open = Gauge("rayjepa_streams", "Streams now", registry=registry)
        self.refused = Counter(
            "rayjepa_streams_refused", "Streams over the limit", registry=registry
        )
        self.frames = Counter("rayjepa_stream_frames", "Frames received", registry=registry)
        self.dropped = Counter("rayjepa_stream_frames_dropped", "Frames dropped", registry=registry)
        self.aspects_differ = Counter(
            "rayjepa_stream_aspects_differ",
            "Streams whose aspect differs from the model's by more than 5%",
            registry=registry,
        )
        self.lag_s = Histogram(
            "rayjepa_stream_lag_seconds",
            "From the arrival of a window's last frame to its embedding",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )


class StreamHub:
    """What the streams of one replica share.

    Args:
        settings: the limits.
        model: the model that new streams get.
        embed: embeds pixels.
        media: fetches and decodes.
        registry: takes the metrics.
    """

    def __init__(
        self,
        settings: ServeSettings,
        model: ServedModel[ModelCard],
        embed: EmbedFunction,
        media: MediaLoader,
        registry: CollectorRegistry,
    ) -> None:
        self.settings, self.model, self.embed, self.media = settings, model, embed, media
        self.metrics = StreamMetrics(registry)
        self.streams = self.decoders = 0
        self._drained = asyncio.Event()

    async def drain(self, begun: Awaitable[None]) -> None:
        """Ends all streams when a replica begins to stop.

        Args:
            begun: returns then.
        """
        await begun
        self._drained.set()

    async def until_drained(self) -> None:
        """Waits until the replica begins to stop, then raises the error for its streams."""
        await self._drained.wait()
        message = "this replica of the server is being stopped; connect again, to another one"
        raise server_error(503, "going_away", message)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Counts a stream while the block runs.

        Raises:
            ApiError: 429, as many streams as allowed are open.
        """
        if self.streams >= self.settings.max_streams:
            self.metrics.refused.inc()
            raise _full("too_many_streams", f"{self.settings.max_streams} streams are open")
        self.streams += 1
        self.metrics.open.inc()
        try:
            yield
        finally:
            self.streams -= 1
            self.metrics.open.dec()

    @contextmanager
    def hold_decoder(self) -> Iterator[DecodePool]:
        """Counts a stream that needs a decoder process while the block runs; raises as `hold`."""
        if self.decoders >= self.settings.max_stream_decoders:
            self.metrics.refused.inc()
            most = self.settings.max_stream_decoders
            raise _full("too_many_streams", f"{most} streams of containers are open")
        self.decoders += 1
        try:
            yield self.media.decoders
        finally:
            self.decoders -= 1


def _full(code: str, message: str) -> ApiError:
    return ApiError(429, code, f"{message}; try again later")


def _model_changed(name: str) -> ApiError:
    message = f"the model {name!r} of this stream has been replaced; connect again for the new one"
    return server_error(503, "model_changed", message)


class Stream:
    """One stream. It has one model from its first embedding to its last.

    Args:
        hub: what it shares with other streams.
        start: the client's first message.
        send: sends a text message to the client.

    Attributes:
        card: the model.
        prep: the transform, with the regions that this stream leaves out.
    """

    def __init__(self, hub: StreamHub, start: StreamStart, send: Send) -> None:
        self._hub, self._start, self._send = hub, start, send
        self.card = hub.model.named(start.model)
        frames = self.card.frames
        self.prep = self.card.transform(start.regions)
        self.every = start.every or max(frames // 2, 1)
        most = hub.settings.stream_queue
        self.queue_size = min(start.queue or most, most)
        self.queue = FrameQueue(self.queue_size, start.drop, start.fps)
        self._window: deque[tuple[Frame, Decoded]] = deque(maxlen=frames)
        self._fresh = 0  # frames of the window that are in no embedding yet
        self._bad_in_a_row = self._rejected = 0
        self._warned = False
        self._sent = self._acknowledged = 0
        self._reported = (0, 0)  # frames and drops that the metrics have counted
        self._credit = asyncio.Event()

    async def run(self) -> None:
        """Sends embeddings until the queue ends, then the message `ended`.

        Raises:
            ApiError: the stream cannot go on.
        """
        await self._send(to_text(self._started()))
        try:
            while (frame := await self.queue.get()) is not None:
                decoded = await self._decoded(frame)
                if decoded is None:
                    continue
                if self._window and not same_patches(self._window[-1][1].input, decoded.input):
                    await self._begin_window()
                self._window.append((frame, decoded))
                self._fresh += 1
                if len(self._window) == self._window.maxlen and self._fresh >= self.every:
                    await self._emit()
            if self._fresh:
                await self._emit()
            await self._send(to_text({"type": "ended"} | self._counters()))
            with suppress(TimeoutError):
                async with asyncio.timeout(LINGER_S):
                    await self._acknowledged_but(0)
        finally:
            self._report()

    def acknowledge(self, index: int) -> None:
        """Notes that the client has read the embeddings up to this index.

        Raises:
            ApiError: 400, no embedding of this index was sent.
        """
        if index >= self._sent:
            raise ApiError(400, "invalid_message", f"embedding {index} was not sent", param="index")
        self._acknowledged = max(self._acknowledged, index + 1)
        self._credit.set()

    def _started(self) -> dict[str, Any]:
        return {
            "type": "started",
            "model": self.card.name,
            "fingerprint": self.card.fingerprint,
            "frames": self.card.frames,
            "every": self.every,
            "queue": self.queue_size,
            "drop": self._start.drop,
            "unacknowledged": self._start.unacknowledged,
        }

    async def _begin_window(self) -> None:
        """Ends a window whose frames have another grid, or other patches, than the next one's."""
        if self._fresh:
            await self._emit()
        self._window.clear()

    async def _decoded(self, frame: Frame) -> Decoded | None:
        """Decodes a frame; returns None, and counts it, if that cannot be done."""
        if not isinstance(frame.content, bytes):
            return frame.content
        try:
            name = f"frame {frame.number}"
            decoded = await self._hub.media.decode_image(frame.content, self.prep, name)
        except ApiError as error:
            if error.param == "exclude":  # the regions are at fault and not the frame
                raise
            self._rejected += 1
            self._bad_in_a_row += 1
            if self._bad_in_a_row >= BAD_FRAMES:
                raise
            return None
        self._bad_in_a_row = 0
        return decoded

    async def _emit(self) -> None:
        """Embeds the window and sends the result, once enough others are acknowledged."""
        await self._acknowledged_but(self._start.unacknowledged - 1)
        frames = [frame for frame, _ in self._window]
        embedding = await self._embed_window()
        lag_s = asyncio.get_running_loop().time() - frames[-1].arrived_s
        message = {
            "type": "embedding",
            "index": self._sent,
            "first_frame": frames[0].number,
            "last_frame": frames[-1].number,
            "start_s": frames[0].time_s,
            "end_s": frames[-1].time_s,
            "lag_s": round(lag_s, 6),
            **self._counters(),
            **encode(embedding, self._start, self._window[0][1].input.kept, self.card.grid),
            **self._warnings(),
        }
        self._fresh = 0
        self._sent += 1
        self._hub.metrics.lag_s.observe(lag_s)
        self._report()
        await self._send(to_text(message))

    def _warnings(self) -> dict[str, Any]:
        """Returns, once in a stream, a field that says how its frames are fitted."""
        size = self._window[-1][1].size
        message = None if self._warned else aspect_warning(size, self.prep)
        if message is None:
            return {}
        self._warned = True
        self._hub.metrics.aspects_differ.inc()
        return {"warnings": [{"code": "aspects_differ", "message": message}]}

    async def _acknowledged_but(self, most: int) -> None:
        """Waits until at most this many embeddings are not acknowledged."""
        while self._sent - self._acknowledged > most:
            self._credit.clear()
            await self._credit.wait()

    async def _embed_window(self) -> Floats:
        """Embeds the window as one clip, filled up to whole time steps at the end."""
        frames = [decoded.input for _, decoded in self._window]
        (pixels,) = to_parts(np.stack([one.pixels for one in frames]), self.card)
        part = EncoderInput(pixels, frames[0].kept)
        deadline = time.monotonic() + self._hub.settings.timeout_s
        looks = 0
        while True:
            try:
                async with asyncio.timeout(self._hub.settings.timeout_s):
                    (embedding,) = await self._hub.embed([part], self._start.pooling, self.card)
                self._hub.model.answered(self.card)
                return embedding
            except TimeoutError as error:
                raise server_error(504, "timeout", "the model does not answer") from error
            except OtherModel as other:
                looks += 1
                if looks == LOOKS:
                    self._hub.model.saw(other.card)
                    raise _model_changed(self.card.name) from other
            except ApiError as error:
                if error.code != "queue_full" or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(RETRY_S)

    def _counters(self) -> dict[str, int]:
        queue = self.queue
        return {
            "received": queue.received,
            "dropped": queue.dropped,
            "skipped": queue.skipped,
            "rejected": self._rejected,
        }

    def _report(self) -> None:
        frames, dropped = self.queue.received, self.queue.dropped
        self._hub.metrics.frames.inc(frames - self._reported[0])
        self._hub.metrics.dropped.inc(dropped - self._reported[1])
        self._reported = (frames, dropped)


async def decode_container(
    hub: StreamHub, pieces: AsyncGenerator[bytes, None], prep: Preprocessing, queue: FrameQueue
) -> None:
    """Decodes a container in a process of its own, puts its frames into a queue and closes that.

    Args:
        hub: what streams share.
        pieces: the container.
        prep: the transform, with the regions that are left out.
        queue: takes the frames.

    Raises:
        ApiError: the bytes are not a video, or decoding takes too long.
    """
    loop = asyncio.get_running_loop()
    job = {"max_pixels": hub.settings.max_video_pixels}
    (height, width), arrived_s = height_width(prep.image_size), loop.time()
    with hub.hold_decoder() as pool:
        try:
            async with aclosing(pieces), pool.worker("stream", prep, job) as worker:
                while True:
                    async with asyncio.timeout(pool.timeout_s):
                        head, payload = await worker.receive(height * width * 3)
                    if "need" in head:
                        piece = await anext(pieces, b"")
                        arrived_s = loop.time()
                        await worker.send({}, piece)
                    elif "time_s" in head:
                        queue.put(head["time_s"], arrived_s, as_decoded(head, payload, prep))
                    elif "reason" in head:
                        raise video_error(head, None)
                    else:
                        break
        except TimeoutError as error:
            message = f"decoding took longer than {pool.timeout_s:g} s"
            raise ApiError(400, "decode_timeout", message) from error
        except DecoderGone as error:
            raise ApiError(400, "decoder_died", DIED) from error
    queue.close()
