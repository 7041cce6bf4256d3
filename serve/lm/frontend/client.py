"""Generations as seen by an ingress replica: start, pull tokens, continue on another replica.

Tokens are pulled by unary calls. With a streaming call the replica would run ahead of a slow reader
without limit, whereas a generation that nobody pulls from pauses by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)

from models.sink_lm.engine.output import End
from serve.ingress.errors import ApiError, queue_full, server_error
from serve.lm.contract import (
    LMCard,
    Piece,
    Refusal,
    SessionState,
    Start,
    Started,
    Taken,
    key_of_replica,
)
from serve.replicas.patience import ReplicaSilent, while_alive

TAKE_WAIT_S = 1.0
TAKE_TOKENS = 64
ATTEMPTS = 60
"""Attempts of one call when replicas die during it; they take about as many seconds."""
GIVE_UP_S = 90.0
"""Seconds after which no further attempt is made, where replicas are silent."""
_LOST = (RayActorError, DeploymentUnavailableError, ReplicaSilent)
Result = TypeVar("Result")


class OtherModel(ApiError):
    """Tokens reached a replica of another model than they were made for.

    Args:
        card: the model of that replica.
    """

    def __init__(self, card: LMCard) -> None:
        message = f"the model was replaced by {card.name!r} meanwhile; send the request again"
        super().__init__(503, "model_changed", message, headers={"Retry-After": "1"})
        self.card = card


class LMClient:
    """Calls `LanguageModel` and turns its refusals and failures into API errors.

    Args:
        handle: Serve handle of `LanguageModel`.
        persistent: whether sessions outlive a replica.
        silence_s: seconds without an answer after which a replica is asked whether it is alive.
    """

    def __init__(self, handle: Any, *, persistent: bool, silence_s: float = 15.0) -> None:
        self._handle, self._silence_s = handle, silence_s
        self.persistent = persistent
        self._cancels: set[asyncio.Task[None]] = set()

    async def describe(self) -> LMCard:
        """Returns what ingress replicas know about the model."""
        card: LMCard = await self._handle.describe.remote()
        return card

    async def call(self, key: str, method: str, *args: Any, anywhere: bool = False) -> Any:
        """Calls a method of the replica that a session belongs to.

        If the replica dies meanwhile, the call is repeated on the next one. Every method is safe to
        repeat; those that create something have a request id among their arguments for that.

        Args:
            key: name of the session, or one made up.
            method: name of the method.
            args: its arguments.
            anywhere: whether any replica will do, so that another is asked instead of a lost one
                before the ring is without that.

        Raises:
            OtherModel: the arguments hold tokens, and the replica serves another model.
            ApiError: the replica refuses, or there is none.
        """
        result, _ = await self._repeat(key, method, *args, anywhere=anywhere)
        if isinstance(result, ApiError):
            raise result
        if isinstance(result, Refusal):
            raise OtherModel(result.card)
        return result

    async def delete(self, session_id: str) -> None:
        """Deletes a session. If a repeated call finds none, the first call has deleted it."""
        result, attempts = await self._repeat(session_id, "delete", session_id)
        if isinstance(result, ApiError) and not (attempts > 1 and result.status == 404):
            raise result

    async def _repeat(
        self, key: str, method: str, *args: Any, anywhere: bool = False
    ) -> tuple[Any, int]:
        """Returns the result of a call, and the number of attempts."""
        until = time.monotonic() + GIVE_UP_S
        for attempt in range(ATTEMPTS):
            try:
                return await self._call_once(key, method, *args), attempt + 1
            except _LOST:
                ends_with_it = not (self.persistent or anywhere)
                if time.monotonic() > until or (ends_with_it and attempt):
                    break
                key = uuid.uuid4().hex if anywhere else key
                await asyncio.sleep(min(1.0, 0.05 * 2**attempt))
                continue
            except BackPressureError as error:
                raise queue_full() from error
        raise server_error(503, "no_replica", "no model replica could take the request")

    def open(self, start: Start, key: str | None = None) -> Answer:
        """Asks for a generation, without waiting for it to begin.

        Args:
            start: what to generate.
            key: leads to a replica, where there is no session; None takes any.
        """
        return Answer(self, start.session_id or key or uuid.uuid4().hex, start)

    async def answer(self, start: Start, key: str | None = None) -> Answer:
        """Starts a generation and waits until it begins; raises `ApiError` if it is refused."""
        answer = self.open(start, key)
        try:
            await answer.begin()
        except BaseException:
            answer.close()
            raise
        return answer

    async def start(self, key: str, start: Start) -> Started:
        """Lets a replica begin; if the caller stops waiting, the generation is cancelled."""
        try:
            anywhere = start.session_id is None
            started: Started = await self.call(key, "start", start, anywhere=anywhere)
        except asyncio.CancelledError:
            self.cancel(key, start.request_id)
            raise
        return started

    async def take(self, key: str, request_id: str) -> Taken | None:
        """Pulls once; returns None if the replica of the answer has ended or is silent.

        A replica answers within `TAKE_WAIT_S`, so it is not asked whether it is alive: if it has
        died, another one might say so in its place.
        """
        handle = self._handle.options(session_id=key, method_name="take")
        try:
            async with asyncio.timeout(TAKE_WAIT_S + 2 * self._silence_s):
                taken: Taken | None = await handle.remote(request_id, TAKE_TOKENS, TAKE_WAIT_S)
        except (*_LOST, TimeoutError):
            return None
        return taken

    async def hold(self, key: str, request_id: str) -> None:
        """Keeps the replica of an answer from being stopped before the answer has ended."""
        handle = self._handle.options(session_id=key, method_name="hold")
        with contextlib.suppress(RayError, RayServeException):
            await handle.remote(request_id)

    def cancel(self, key: str, request_id: str) -> None:
        """Cancels a generation without waiting for it.

        The call has a context of its own, or Serve would cancel it with the request it comes from.
        """

        async def send() -> None:
            try:
                await self._call_once(key, "cancel", request_id)
            except (*_LOST, BackPressureError):
                return  # it ended with its replica, or will end there without a reader

        task = asyncio.get_running_loop().create_task(send(), context=contextvars.Context())
        self._cancels.add(task)
        task.add_done_callback(self._cancels.discard)

    async def _call_once(self, session_id: str, method: str, *args: Any) -> Any:
        """Calls a method; the call counts as lost once its replica no longer knows of it.

        A dead replica's place is taken by another one, which answers pings, but not this call.
        """
        call_id = uuid.uuid4().hex

        def remote(name: str, *given: Any, **named: str) -> Any:
            handle = self._handle.options(session_id=session_id, method_name=name)
            return handle.remote(*given, **named)

        async def call() -> Any:
            return await remote(method, *args, call_id=call_id)

        async def ping() -> None:
            if not await remote("works_on", call_id):
                raise ReplicaSilent("another replica has taken its place")

        return await while_alive(call(), ping, silence_s=self._silence_s)


class Answer:
    """A generation that is starting or in progress, on whichever replica.

    Args:
        client: calls the model's replicas.
        key: routes calls to the replica.
        start: what to generate; the call is made at once.

    Attributes:
        session: state of the session after the latest piece; None without a session.
    """

    def __init__(self, client: LMClient, key: str, start: Start) -> None:
        self._client, self._key, self._start = client, key, start
        self._at = key  # where it is generated, once that is known
        self._holding: asyncio.Task[None] | None = None
        self._starting = asyncio.ensure_future(client.start(key, start))
        self.session: SessionState | None = None
        self._position = self._made = 0
        self._choices = max(1, len(start.feeds) * start.n)
        self._ended: set[int] = set()
        self._closed = False

    async def begin(self, within_s: float | None = None) -> None:
        """Waits until the replica has begun, at most for so many seconds.

        Raises:
            ApiError: the replica refuses.
        """
        begun, _ = await asyncio.wait({self._starting}, timeout=within_s)
        if begun:
            self.session, self._position = self.started.session, self.started.position
            if self._holding is None:
                self._stay_at(self.started)

    def _stay_at(self, started: Started) -> None:
        """Sends further calls to the replica that generates the answer, until it has ended."""
        if started.replica:
            self._at = key_of_replica(started.replica)
        if self._holding is not None:
            self._holding.cancel()
        self._holding = asyncio.ensure_future(self._client.hold(self._at, self._start.request_id))

    @property
    def started(self) -> Started:
        """The first replica's answer to the start; raises the error if it refused."""
        return self._starting.result()

    async def pieces(self) -> AsyncGenerator[tuple[Piece, ...], None]:
        """Yields new pieces, or an empty tuple if there are none yet, until every choice has ended.

        Closing the generator early cancels the generation after the current token; the session
        stays.
        """
        try:
            await self.begin()
            while len(self._ended) < self._choices:
                taken = await self._client.take(self._at, self._start.request_id)
                if taken is None or _is_lost(taken):
                    if self._made == self._start.params.max_tokens:  # only its end was lost
                        self._ended.add(0)
                        yield (Piece(index=0, tokens=(), end=End(reason="length")),)
                    else:
                        await self._go_on()
                    continue
                self._note(taken)
                yield taken.pieces
        finally:
            self.close()

    def close(self) -> None:
        """Cancels the generation if it has not ended, even if it has not begun."""
        if self._holding is not None:
            self._holding.cancel()
        if not self._starting.done():
            self._starting.cancel()
        elif _failed(self._starting):
            return
        elif len(self._ended) < self._choices and not self._closed:
            self._closed = True
            self._client.cancel(self._at, self._start.request_id)

    def _note(self, taken: Taken) -> None:
        self.session = taken.session or self.session
        for piece in taken.pieces:
            self._made += piece.made
            if piece.tokens:
                self._position = piece.tokens[-1].position
            if piece.end is not None:
                self._ended.add(piece.index)

    async def _go_on(self) -> None:
        """Continues after the last piece, on the replica that has the session now."""
        session_id = self._start.session_id
        if session_id is None or self.session is None:
            raise _replica_lost()
        params = self._start.params.after(self._made)
        again = dataclasses.replace(
            self._start, feeds=(), params=params, resume_at=self._position, goes_on=True
        )
        for attempt in range(ATTEMPTS):
            try:
                self._stay_at(await self._client.start(self._key, again))
                return
            except ApiError as error:
                if error.status == 404 and not self._client.persistent:  # it ended with its replica
                    raise _replica_lost() from error
                if error.status != 429 or attempt + 1 == ATTEMPTS:
                    raise
            await asyncio.sleep(1)  # the replicas that are left have no slab free yet


def _failed(task: asyncio.Task[Started]) -> bool:
    return task.cancelled() or task.exception() is not None


def _replica_lost() -> ApiError:
    return server_error(503, "replica_lost", "the model replica died; send it again")


def _is_lost(taken: Taken) -> bool:
    return any(piece.end is not None and piece.end.reason == "lost" for piece in taken.pieces)
