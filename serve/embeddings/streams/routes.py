"""The WebSocket route `/v1/streams`."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

from serve.embeddings.encoding import check_output
from serve.embeddings.media.inputs import Reference, Sampling
from serve.embeddings.streams.messages import (
    End,
    StreamStart,
    parse_control,
    parse_start,
    split_timestamp,
)
from serve.embeddings.streams.stream import Stream, StreamHub, decode_container
from serve.ingress.errors import ApiError, server_error
from serve.ingress.websockets import NORMAL, refuse

START_WITHIN_S = 10.0
BUFFER_BYTES = 8_388_608
"""Bytes of a container that may wait for the decoder; more ends the stream, because a container
with missing bytes cannot be decoded."""

TEXT_LENGTH = 65_536
"""Characters of one text message at most."""

logger = logging.getLogger("ray.serve")


def add_stream_route(app: FastAPI, hub: StreamHub) -> None:
    """Adds `/v1/streams` to an application."""

    @app.websocket("/v1/streams")
    async def streams(websocket: WebSocket) -> None:
        """Receives frames and sends embeddings; see docs/serving.md."""
        await websocket.accept()
        try:
            with hub.hold():
                await _serve(websocket, hub)
            await websocket.close(NORMAL)
        except WebSocketDisconnect:
            return  # the client has left
        except ApiError as error:
            await refuse(websocket, error)
        except Exception:
            logger.exception("a stream failed")
            await refuse(websocket, server_error(500, "internal_error", "internal error"))


async def _serve(websocket: WebSocket, hub: StreamHub) -> None:
    start = await _receive_start(websocket, hub)
    stream = Stream(hub, start, websocket.send_text)
    check_output(start, start.regions, stream.card)
    if start.url is not None:
        pieces = hub.media.fetcher.stream(_url_reference(start.url, hub))
        reader = _read_controls(websocket, stream)
        source = decode_container(hub, pieces, stream.prep, stream.queue)
        await run_with(stream.run(), reader, source, hub.until_drained())
    elif start.source == "container":
        buffer = ByteBuffer()
        reader = _Reader(websocket, hub, stream, start, buffer).run()
        source = decode_container(hub, buffer.pieces(), stream.prep, stream.queue)
        await run_with(stream.run(), reader, source, hub.until_drained())
    else:
        reader = _Reader(websocket, hub, stream, start, None).run()
        await run_with(stream.run(), reader, hub.until_drained())


async def run_with(main: Coroutine[Any, Any, None], *helpers: Coroutine[Any, Any, None]) -> None:
    """Runs all until `main` ends or one of them raises, then cancels the others and awaits them."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in (main, *helpers)]
    pending = set(tasks)
    try:
        while not tasks[0].done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _receive_start(websocket: WebSocket, hub: StreamHub) -> StreamStart:
    try:
        async with asyncio.timeout(START_WITHIN_S):
            data = await _receive(websocket)
    except TimeoutError as error:
        raise ApiError(408, "idle", f"no start message within {START_WITHIN_S:g} s") from error
    if not isinstance(data, str):
        raise ApiError(400, "invalid_message", "the first message is text: a start message")
    return parse_start(data)


async def _receive(websocket: WebSocket) -> str | bytes:
    """Waits for the next message and returns it.

    Raises:
        WebSocketDisconnect: the client has left.
        ApiError: 413, the message is too long.
    """
    event = await websocket.receive()
    if event["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(event.get("code", 1005))
    text: str | None = event.get("text")
    if text is None:
        return bytes(event.get("bytes") or b"")
    if len(text) > TEXT_LENGTH:
        message = f"a text message has more than {TEXT_LENGTH} characters"
        raise ApiError(413, "message_too_large", message)
    return text


def _url_reference(url: str, hub: StreamHub) -> Reference:
    if not hub.settings.stream_urls:
        message = "opening streams by URL is off on this server"
        raise ApiError(400, "url_not_allowed", message, param="url")
    return Reference("url", url, True, Sampling())


async def _read_controls(websocket: WebSocket, stream: Stream) -> None:
    """Reads the messages of a client whose frames come from a URL."""
    while True:
        data = await _receive(websocket)
        if not isinstance(data, str):
            raise ApiError(400, "invalid_message", "this stream's frames come from its URL")
        control = parse_control(data)
        if isinstance(control, End):
            raise WebSocketDisconnect(NORMAL)
        stream.acknowledge(control.index)


class _Reader:
    """Reads every message as soon as it comes, or messages would pile up unseen in the server."""

    def __init__(
        self,
        websocket: WebSocket,
        hub: StreamHub,
        stream: Stream,
        start: StreamStart,
        buffer: ByteBuffer | None,
    ) -> None:
        self._websocket, self._hub, self._stream = websocket, hub, stream
        self._start, self._buffer = start, buffer
        self._first_s: float | None = None
        self._ended = False

    async def run(self) -> None:
        """Reads until the client leaves or sends what it may not.

        Raises:
            ApiError: the client sent what it may not, or nothing for too long.
            WebSocketDisconnect: the client left.
        """
        idle_s = self._hub.settings.stream_idle_s
        while True:
            try:
                async with asyncio.timeout(None if self._ended else idle_s):
                    data = await _receive(self._websocket)
            except TimeoutError as error:
                raise ApiError(408, "idle", f"nothing came for {idle_s:g} s") from error
            if isinstance(data, str):
                self._control(data)
            elif self._ended:
                raise ApiError(400, "invalid_message", "a frame after the end")
            elif self._buffer is not None:
                self._buffer.put(data)
            else:
                self._frame(data)

    def _control(self, text: str) -> None:
        control = parse_control(text)
        if not isinstance(control, End):
            self._stream.acknowledge(control.index)
            return
        self._ended = True
        if self._buffer is not None:
            self._buffer.close()  # the decoder reads the rest, then closes the queue
        else:
            self._stream.queue.close()

    def _frame(self, data: bytes) -> None:
        now_s = asyncio.get_running_loop().time()
        self._first_s = now_s if self._first_s is None else self._first_s
        time_s = now_s - self._first_s
        if self._start.timestamps:
            time_s, data = split_timestamp(data)
        most = self._hub.settings.max_image_bytes
        if len(data) > most:
            raise ApiError(413, "image_too_large", f"a frame has more than {most} encoded bytes")
        self._stream.queue.put(time_s, now_s, data)


class ByteBuffer:
    """Bytes of a container on the way from the socket to the decoder."""

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._size = 0
        self._changed = asyncio.Event()
        self._closed = False

    def put(self, piece: bytes) -> None:
        """Adds a piece.

        Raises:
            ApiError: 413, too many bytes wait for the decoder.
        """
        self._size += len(piece)
        if self._size > BUFFER_BYTES:
            message = f"more than {BUFFER_BYTES} bytes wait for decoding; send no faster than live"
            raise ApiError(413, "too_fast", message)
        if piece:  # an empty piece would mean the end to the decoder
            self._pieces.append(piece)
            self._changed.set()

    def close(self) -> None:
        """Says that no more pieces will come."""
        self._closed = True
        self._changed.set()

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yields the pieces as they come."""
        while True:
            while not self._pieces:
                if self._closed:
                    return
                self._changed.clear()
                await self._changed.wait()
            piece = self._pieces.popleft()
            self._size -= len(piece)
            yield piece
