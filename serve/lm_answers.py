"""What a replica holds of an answer in progress: generations, and what may be shown of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from models.sink_lm.generation import EndEvent, Generation, TokenEvent
from models.sink_lm.stops import StopMatcher
from models.sink_lm.tokenizer import Tokenizer
from serve.lm_contract import End, Options, Piece, Token
from serve.lm_sessions import Held
from serve.token_log import LostSession


class AnswerText:
    """The text of an answer that goes on where another reader or request left off.

    The engine decodes every generation afresh; this one knows what came before, so that neither a
    character nor a stop string is cut at the border.

    Args:
        tokenizer: the model's.
        options: of the request.
        before: tokens of the stream before the first one shown.
        answering: whether `before` belongs to the same answer (its text may begin a stop string).
    """

    def __init__(
        self, tokenizer: Tokenizer, options: Options, before: Sequence[int], *, answering: bool
    ) -> None:
        self._options, self._eos_ids = options, tokenizer.eos_ids
        self._decoder = tokenizer.stream()
        self._stops = StopMatcher(options.stop)
        self._over: End | None = None  # an answer that the reader has all of but its end
        for token in before:
            text = self._decoder.push(token)
            if answering:
                stop = self._ends(token) or self._stops.push(text)[1]
                self._over = End(reason="stop") if stop else None

    def show(self, position: int, token: int, number: int) -> tuple[Token, End | None]:
        """One more token, the answer's `number`th (from 1), and the end if it is the last."""
        options = self._options
        if number > options.min_tokens and self._ends(token):
            named = token if token in options.stop_token_ids else None
            return Token(position, token, ""), End(
                reason="stop", stop=named, text=self._stops.flush()
            )
        text, stop = self._stops.push(self._decoder.push(token))
        end = End(reason="stop", stop=stop) if stop is not None else None
        if end is None and number == options.max_tokens:
            end = End(reason="length", text=self._stops.flush())
        return Token(position, token, text), end

    def _ends(self, token: int) -> bool:
        eos = token in self._eos_ids and not self._options.ignore_eos
        return eos or token in self._options.stop_token_ids

    def flush(self) -> str:
        """What was held back, once nothing follows."""
        return self._stops.flush()

    def replay(self, tokens: Sequence[int], position: int) -> tuple[list[Token], End | None]:
        """Tokens that the log has after `position`, and the end if the answer ended there."""
        shown: list[Token] = []
        if self._over is not None and not tokens:
            return shown, self._over
        for token in tokens:
            one, end = self.show(position + len(shown) + 1, token, len(shown) + 1)
            shown.append(one)
            if end is not None:
                return shown, end
        return shown, None


class Source:
    """One choice of an answer: what the log already has of it, then what is generated.

    Args:
        session_id: the engine's session.
        generation: None where the log has it all.
        held: the kept session; its tokens are shown once they are durable.
        text: makes the text of generated tokens; None takes the engine's.
        replay: tokens from the log.
        end: of an answer without a generation.
    """

    def __init__(
        self,
        session_id: str,
        generation: Generation | None,
        held: Held | None = None,
        text: AnswerText | None = None,
        replay: Sequence[Token] = (),
        end: End | None = None,
    ) -> None:
        self.session_id, self.generation = session_id, generation
        self._held, self._text, self._shown = held, text, len(replay)
        self._own_end: End | None = None
        self._ready: deque[Token | End] = deque(replay)
        if end is not None:
            self._ready.append(end)
        self.ended = False

    def take(self, max_tokens: int) -> tuple[list[Token], End | None]:
        """What may be shown now."""
        if self._held is not None and self._held.failure is not None:
            self.ended = True
            lost = isinstance(self._held.failure, LostSession)
            return [], End(reason="lost" if lost else "error", message=str(self._held.failure))
        if self.generation is not None and not self._ready:
            for event in self.generation.take(max_tokens, 0.0):
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

    def _convert(self, event: TokenEvent | EndEvent) -> list[Token | End]:
        if isinstance(event, EndEvent):
            text = event.text
            if self._text is not None:
                text = self._own_end.text if self._own_end is not None else self._text.flush()
            return [
                End(reason=event.reason, stop=event.stop, text=text, message=event.message or "")
            ]
        if self._text is None:
            return [Token(event.position, event.token, event.text, event.logprob, tuple(event.top))]
        self._shown += 1
        token, end = self._text.show(event.position, event.token, self._shown)
        self._own_end = end
        token = Token(token.position, token.token, token.text, event.logprob, tuple(event.top))
        if end is None or end.stop is None or not isinstance(end.stop, str):
            return [token]  # the engine sees every other end itself
        if self.generation is not None:
            self.generation.cancel()
        return [token, end]


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
            if source.generation is not None:
                source.generation.notify = tell

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

    def cancel(self) -> None:
        """Ends the generations at a token boundary."""
        for source in self.sources:
            if source.generation is not None:
                source.generation.cancel()

    @property
    def stopped(self) -> bool:
        """Whether the engine has let go of every generation."""
        return all(s.generation is None or s.generation.ended for s in self.sources)

    def _take_now(self, max_tokens: int) -> tuple[Piece, ...]:
        pieces = []
        for index, source in enumerate(self.sources):
            if not source.ended:
                tokens, end = source.take(max_tokens)
                if tokens or end is not None:
                    pieces.append(Piece(index=index, tokens=tuple(tokens), end=end))
        return tuple(pieces)
