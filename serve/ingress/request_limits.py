"""Limits of requests: the length and time of each body, the bytes of all, the number in progress.

A request takes a place only once its body is complete, so that clients who send half a body keep
nobody out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from serve.ingress.errors import ApiError, queue_full
from serve.ingress.settings import ApplicationSettings

LEAST_BYTES_PER_S = 1024
"""A body that arrives faster than this has no time limit; a phone on a bad line is faster."""


class RequestLimits:
    """Limits the requests of one replica.

    Args:
        settings: limits of the bodies.
        max_requests: requests with a complete body that may be in progress at the same time.

    Attributes:
        arriving_bytes: bytes of all bodies that are not complete yet.
        requests: requests with a complete body that are in progress.
    """

    def __init__(self, settings: ApplicationSettings, *, max_requests: int) -> None:
        self._timeout_s = settings.body_timeout_s
        self._max_body_bytes = settings.max_request_bytes
        self._max_bytes = settings.max_arriving_bytes or 16 * settings.max_request_bytes
        self._max_requests = max_requests
        self.arriving_bytes = self.requests = 0

    @contextmanager
    def watch(self, scope: Scope, receive: Receive) -> Iterator[Receive]:
        """Yields a function that reads the body of one request within the limits.

        That function raises:
            ApiError: 408 for a body that does not come, 413 for one that is too long, 429 where
                there is no room for it.
        """
        arrival = _ArrivingBody(self, receive, Headers(scope=scope).get("content-length", ""))
        try:
            yield arrival.receive
        finally:
            arrival.leave()

    def deadline(self, started: float, received: int) -> float:
        """Returns when the next piece of a body must have arrived, by `time.monotonic`.

        Args:
            started: when the request began.
            received: bytes of the body so far.
        """
        stalled = time.monotonic() + self._timeout_s
        return min(stalled, started + self._timeout_s + received / LEAST_BYTES_PER_S)

    def check(self) -> None:
        """Raises a 429 if as many requests as allowed are in progress."""
        if self.requests >= self._max_requests:
            raise queue_full()

    def check_length(self, size: int) -> None:
        """Raises a 413 if a body has more bytes than allowed."""
        if size > self._max_body_bytes:
            message = f"the body has more than {self._max_body_bytes} bytes"
            raise ApiError(413, "request_too_large", message)

    def grow(self, size: int) -> None:
        """Counts further arriving bytes; raises a 429 if they are more than allowed."""
        if self.arriving_bytes + size > self._max_bytes:
            raise queue_full()
        self.arriving_bytes += size

    def slow(self) -> ApiError:
        """Returns the 408; it closes the connection, or the rest would be read as a new request."""
        message = (
            f"the body did not arrive: nothing for {self._timeout_s:g} s, or less than "
            f"{LEAST_BYTES_PER_S} bytes a second"
        )
        return ApiError(408, "body_timeout", message, headers={"Connection": "close"})


class _ArrivingBody:
    """The body of one request, from its first byte to the request's end."""

    def __init__(self, limits: RequestLimits, receive: Receive, declared: str) -> None:
        self._limits, self._receive = limits, receive
        self._declared_size = int(declared) if declared.isdigit() else 0
        self._started = time.monotonic()
        self._size = 0
        self._is_whole = False

    async def receive(self) -> Message:
        """Returns the next ASGI message; see `RequestLimits.watch`."""
        if self._is_whole:
            return await self._receive()  # tells only whether the client leaves
        self._limits.check_length(self._declared_size)
        self._limits.check()  # refuse before reading a body
        left_s = self._limits.deadline(self._started, self._size) - time.monotonic()
        try:
            async with asyncio.timeout(left_s):
                message = await self._receive()
        except TimeoutError as error:
            raise self._limits.slow() from error
        if message["type"] == "http.request":
            self._take(message)
        return message

    def _take(self, message: Message) -> None:
        size = len(message.get("body", b""))
        self._limits.grow(size)
        self._size += size
        self._limits.check_length(self._size)  # a declared length may be absent or wrong
        if not message.get("more_body", False):
            self._limits.check()
            self._limits.requests += 1
            self._limits.arriving_bytes -= self._size
            self._is_whole = True

    def leave(self) -> None:
        """Gives back the bytes or the place that the request has."""
        if self._is_whole:
            self._limits.requests -= 1
        else:
            self._limits.arriving_bytes -= self._size
