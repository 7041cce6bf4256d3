"""The answers of one request while they are generated, and what may be shown of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from models.sink_lm.engine.generation import Generation
from models.sink_lm.engine.output import End, Token
from models.sink_lm.engine.output_processor import OutputProcessor
from models.sink_lm.engine.sampling import Choice
from models.sink_lm.engine.session import UnknownSession
from serve.lm.contract import Piece
from serve.lm.replica.resident_session import ResidentSession
from serve.lm.replica.tasks import io
from serve.lm.store.token_log import LostSession, TokenLog

REPLAY_TOKENS = 256
"""Tokens read from a log at a time."""


@dataclass(kw_only=True)
class Replay:
    """The part of an answer that its session's log already has.

    The log is read as fast as it is shown. Generation goes on from its end.

    Attributes:
        log: of the session.
        position: stream position up to which the log was read.
        stop: stream position at which the log ended when the reader came.
        output: makes the text, of the replayed tokens and of those that are generated after them.
        begin: starts to generate.
    """

    log: TokenLog
    position: int
    stop: int
    output: OutputProcessor
    begin: Callable[[], Awaitable[Generation]]

    async def read(self) -> list[Token | End]:
        """Returns the next tokens, and the end if the answer ends with one of them."""
        events: list[Token | End] = []
        stop = min(self.stop, self.position + REPLAY_TOKENS)
        for token in await io(partial(self.log.read, self.position, stop)):
            self.position += 1
            events.append(self.output.push(Choice(token), self.position))
            if self.output.end is not None:
                return [*events, self.output.end]
        return events


class ChoiceStream:
    """One choice of a request: its tokens as they may be shown.

    Args:
        session_id: the engine's session.
        generation: None where the log is replayed first, or has the whole answer.
        session: the resident session; its tokens are shown once they are durable.
        replay: the part of the answer that the log has.
        end: of an answer that has ended before.
        prompt: tokens to show before the answer's own.
    """

    def __init__(
        self,
        session_id: str,
        generation: Generation | None = None,
        *,
        session: ResidentSession | None = None,
        replay: Replay | None = None,
        end: End | None = None,
        prompt: Sequence[Token] = (),
    ) -> None:
        self.session_id = session_id
        self.notify: Callable[[], None] | None = None
        self.ended = False
        self._generation, self._replay, self._session = generation, replay, session
        self._ready: deque[Token | End] = deque(prompt if end is None else (end,))
        self._filling = self._cancelled = False

    def tell(self, notify: Callable[[], None]) -> None:
        """Has `notify` called, from any thread, when there may be something to take."""
        self.notify = notify
        if self._generation is not None:
            self._generation.notify = notify

    @property
    def stopped(self) -> bool:
        """Whether the engine is done with it; once it was cancelled, that stays so."""
        return not self._filling and (self._generation is None or self._generation.ended)

    def cancel(self) -> None:
        """Ends the generation at a token boundary."""
        self._cancelled = True
        if self._generation is not None:
            self._generation.cancel()

    async def fill(self) -> None:
        """Reads on in the log when nothing is ready; begins to generate where the log ends."""
        if self._replay is None or self._ready or self._filling or self._cancelled:
            return
        self._filling = True
        try:
            await self._fill(self._replay)
        except UnknownSession:
            self._ready.append(End(reason="lost"))
        except OSError as error:
            self._ready.append(End(reason="error", message=str(error)))
        finally:
            self._filling = False

    async def _fill(self, replay: Replay) -> None:
        if replay.position == replay.stop:
            self._replay = None
            generation = await replay.begin()
            if self._cancelled:
                generation.cancel()
            generation.notify, self._generation = self.notify, generation
            return
        self._ready.extend(await replay.read())
        if replay.output.end is not None:
            self._replay = None

    def take(self, max_tokens: int) -> tuple[list[Token], End | None]:
        """Returns the tokens that may be shown now, and the end after the last one."""
        if self._session is not None and self._session.failure is not None:
            self.ended = True
            lost = isinstance(self._session.failure, LostSession)
            return [], End(reason="lost" if lost else "error", message=str(self._session.failure))
        if self._generation is not None and not self._ready:
            self._ready.extend(self._generation.take(max_tokens, 0.0))
        tokens: list[Token] = []
        while self._ready and len(tokens) < max_tokens:
            first = self._ready[0]
            if isinstance(first, End):
                self.ended = True
                return tokens, first
            if self._session is not None and first.position > self._session.log.durable:
                break
            tokens.append(first)
            self._ready.popleft()
        return tokens, None


class ActiveGeneration:
    """All choices of one request.

    Args:
        choices: their streams.
        session_id: the session it belongs to; None for temporary ones.
    """

    def __init__(self, choices: Sequence[ChoiceStream], session_id: str | None) -> None:
        self.choices, self.session_id = choices, session_id
        self.last_read = time.monotonic()
        self.readers = 0
        self._news = asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell() -> None:
            loop.call_soon_threadsafe(self._news.set)

        self.tell = tell
        for choice in choices:
            choice.tell(tell)

    @property
    def ended(self) -> bool:
        """Whether everything was taken."""
        return all(choice.ended for choice in self.choices)

    async def take(self, max_tokens: int, wait_s: float) -> tuple[Piece, ...]:
        """Returns what is new, after waiting up to `wait_s` seconds for something to be."""
        self.readers += 1
        deadline = time.monotonic() + wait_s
        try:
            while True:
                self._news.clear()
                for choice in self.choices:
                    await choice.fill()
                pieces = self._take_now(max_tokens)
                left = deadline - time.monotonic()
                if pieces or left <= 0:
                    return pieces
                try:
                    await asyncio.wait_for(self._news.wait(), left)
                except TimeoutError:
                    continue
        finally:
            self.readers -= 1
            self.last_read = time.monotonic()

    async def stop(self) -> None:
        """Ends the generations at a token boundary; returns when the engine is done with them."""
        for choice in self.choices:
            choice.cancel()
        while not all(choice.stopped for choice in self.choices):
            await asyncio.sleep(0.005)

    def _take_now(self, max_tokens: int) -> tuple[Piece, ...]:
        pieces = []
        for index, choice in enumerate(self.choices):
            if not choice.ended:
                tokens, end = choice.take(max_tokens)
                if tokens or end is not None:
                    pieces.append(Piece(index=index, tokens=tuple(tokens), end=end))
        return tuple(pieces)
