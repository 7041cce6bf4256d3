"""What a replica holds of an answer in progress: generations, and what may be shown of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from models.sink_lm.engine.generation import EndEvent, Event, Generation, PromptEvent, TokenEvent
from models.sink_lm.engine.session import UnknownSession
from serve.lm.contract import End, Piece, Token
from serve.lm.replica.resident_session import Held, io
from serve.lm.replica.text import AnswerText
from serve.lm.store.token_log import LostSession, TokenLog

REPLAY_TOKENS = 256
"""Tokens read from a log at a time."""


@dataclass(kw_only=True)
class Replay:
    """What the log has of an answer; it is read as fast as it is shown, then the answer goes on.

    Attributes:
        log: of the session.
        position: tokens of the stream that were read.
        stop: tokens of the stream that the log had when the reader came.
        begin: starts to generate, given how many tokens were replayed.
    """

    log: TokenLog
    position: int
    stop: int
    begin: Callable[[int], Awaitable[Generation]]


class Source:
    """One choice of an answer.

    Args:
        session_id: the engine's session.
        generation: None where the log is replayed first, or has it all.
        held: the kept session; its tokens are shown once they are durable.
        text: makes the text of its tokens; None takes the engine's.
        replay: what the log has of the answer.
        end: of an answer that has ended before.
        prompt: tokens to show before its own.
    """

    def __init__(
        self,
        session_id: str,
        generation: Generation | None = None,
        *,
        held: Held | None = None,
        text: AnswerText | None = None,
        replay: Replay | None = None,
        end: End | None = None,
        prompt: Sequence[Token] = (),
    ) -> None:
        self.session_id = session_id
        self.notify: Callable[[], None] | None = None
        self.ended = False
        self._generation, self._replay = generation, replay
        self._held, self._text, self._shown = held, text, 0
        self._own_end: End | None = None
        self._ready: deque[Token | End] = deque(prompt if end is None else (end,))
        self._filling = self._cancelled = False

    def tell(self, notify: Callable[[], None]) -> None:
        """Has `notify` called, from any thread, when there may be something to take."""
        self.notify = notify
        if self._generation is not None:
            self._generation.notify = notify

    @property
    def stopped(self) -> bool:
        """Whether the engine has let go of it, for good once it was cancelled."""
        return not self._filling and (self._generation is None or self._generation.ended)

    def cancel(self) -> None:
        """Ends the generation at a token boundary."""
        self._cancelled = True
        if self._generation is not None:
            self._generation.cancel()

    async def fill(self) -> None:
        """Reads on in the log where nothing is ready; begins to generate where that has ended."""
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
            generation = await replay.begin(self._shown)
            if self._cancelled:
                generation.cancel()
            generation.notify, self._generation = self.notify, generation
            return
        stop = min(replay.stop, replay.position + REPLAY_TOKENS)
        ids = await io(partial(replay.log.read, replay.position, stop))
        assert self._text is not None
        for token in ids:
            replay.position += 1
            self._shown += 1
            shown, end = self._text.show(replay.position, token, self._shown)
            self._ready.append(shown)
            if end is not None:
                self._ready.append(end)
                self._replay = None
                return

    def take(self, max_tokens: int) -> tuple[list[Token], End | None]:
        """What may be shown now."""
        if self._held is not None and self._held.failure is not None:
            self.ended = True
            lost = isinstance(self._held.failure, LostSession)
            return [], End(reason="lost" if lost else "error", message=str(self._held.failure))
        if self._generation is not None and not self._ready:
            for event in self._generation.take(max_tokens, 0.0):
                self._ready.extend(self._convert(event))
        tokens: list[Token] = []
        while self._ready and len(tokens) < max_tokens:
            first = self._ready[0]
            if isinstance(first, End):
                self.ended = True
                return tokens, first
            if self._held is not None and first.position > self._held.log.durable:
                break
            tokens.append(first)
            self._ready.popleft()
        return tokens, None

    def _convert(self, event: Event) -> list[Token | End]:
        if isinstance(event, PromptEvent):
            return [prompt_token(event)]
        if isinstance(event, EndEvent):
            text = event.text
            if self._text is not None:
                text = self._own_end.text if self._own_end is not None else self._text.flush()
            return [
                End(reason=event.reason, stop=event.stop, text=text, message=event.message or "")
            ]
        if self._text is None:
            return [_token(event, event.text, event.offset)]
        self._shown += 1
        token, end = self._text.show(event.position, event.token, self._shown)
        self._own_end = end
        token = _token(event, token.text, token.offset)
        if end is None or end.stop is None or not isinstance(end.stop, str):
            return [token]  # the engine sees every other end itself
        self.cancel()
        return [token, end]


def prompt_token(event: PromptEvent) -> Token:
    """A token of the prompt, for whoever asked for it."""
    return Token(0, event.token, "", event.logprob, event.top, in_prompt=True)


def _token(event: TokenEvent, text: str, offset: int) -> Token:
    return Token(event.position, event.token, text, event.logprob, event.top, offset)


class RunningAnswer:
    """The choices of one request.

    Args:
        sources: one per choice.
        kept: the session it belongs to; None for temporary ones.
    """

    def __init__(self, sources: Sequence[Source], kept: str | None) -> None:
        self.sources, self.kept = sources, kept
        self.last_read = time.monotonic()
        self.readers = 0
        self._news = asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell() -> None:
            loop.call_soon_threadsafe(self._news.set)

        self.tell = tell
        for source in sources:
            source.tell(tell)

    @property
    def ended(self) -> bool:
        """Whether everything was taken."""
        return all(source.ended for source in self.sources)

    async def take(self, max_tokens: int, wait_s: float) -> tuple[Piece, ...]:
        """What is new, after waiting up to `wait_s` for something to be."""
        self.readers += 1
        deadline = time.monotonic() + wait_s
        try:
            while True:
                self._news.clear()
                for source in self.sources:
                    await source.fill()
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
        """Ends the generations at a token boundary, and waits until the engine has let go."""
        for source in self.sources:
            source.cancel()
        while not all(source.stopped for source in self.sources):
            await asyncio.sleep(0.005)

    def _take_now(self, max_tokens: int) -> tuple[Piece, ...]:
        pieces = []
        for index, source in enumerate(self.sources):
            if not source.ended:
                tokens, end = source.take(max_tokens)
                if tokens or end is not None:
                    pieces.append(Piece(index=index, tokens=tuple(tokens), end=end))
        return tuple(pieces)
