"""One answer being made: its rules, its text, and a bounded queue towards its reader."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from models.sink_lm.checkpoints.tokenizer import Tokenizer
from models.sink_lm.engine.output_processor import StopMatcher
from models.sink_lm.engine.sampling import Choice, Sampler
from models.sink_lm.engine.sampling_params import SamplingParams

log = logging.getLogger(__name__)

EndReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One generated token.

    Attributes:
        position: tokens in the stream, this one included.
        token: its id.
        text: what became readable; empty within a character or a possible stop string.
        logprob: its log probability, if asked for.
        top: the likeliest (id, log probability).
        offset: characters of the answer before the first one that it has a part in.
    """

    position: int
    token: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """One token of the prompt that was read.

    Attributes:
        token: its id.
        logprob: its log probability after those before it; None for the first of a stream.
        top: the likeliest (id, log probability) in its place.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class EndEvent:
    """The end of an answer.

    Attributes:
        reason: why.
        stop: the stop string or token that ended it.
        text: what had been held back and is part of the answer.
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, an end token included.
        message: of an error.
    """

    reason: EndReason
    stop: str | int | None
    text: str
    prompt_tokens: int
    completion_tokens: int
    message: str | None = None


Event = TokenEvent | PromptEvent | EndEvent


class Generation:
    """Handed to whoever asked; thread-safe.

    Args:
        params: how to generate.
        tokenizer: turns tokens into text.
        prompt_tokens: for the count at the end.
        vocab_size: token ids are below it.
        max_buffered: unread events at most; a full queue pauses the session.
        on_room: called when a full queue has room again, or on a cancel.

    Raises:
        ValueError: rules that name what there is not.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        prompt_tokens: int,
        vocab_size: int,
        max_buffered: int,
        on_room: Callable[[], None],
    ) -> None:
        self.params = params
        self._end_ids = set(params.stop_token_ids)
        self._eos_ids = set() if params.ignore_eos else set(tokenizer.eos_ids)
        ends = self._end_ids | self._eos_ids
        self.sampler = Sampler(params, vocab_size, banned=ends, banned_for=params.min_tokens)
        self.notify: Callable[[], None] | None = None
        """Called within a tick when events are there to take; if it raises, nobody reads any more."""
        self.cancelled = False
        self._text = tokenizer.stream()
        self._stops = StopMatcher(params.stop)
        self._prompt_tokens, self._tokens, self._chars = prompt_tokens, 0, 0
        self._max_buffered, self._on_room = max_buffered, on_room
        self._events: deque[Event] = deque()
        self._ready = threading.Condition()
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the last event was made (it may still wait to be taken)."""
        return self._ended

    @property
    def done(self) -> bool:
        """Whether everything was made and taken."""
        return self._ended and not self._events

    @property
    def is_paused(self) -> bool:
        """Whether the reader is so far behind that nothing more may be made."""
        return len(self._events) >= self._max_buffered

    def take(self, max_events: int = 64, timeout: float | None = 0.0) -> list[Event]:
        """Takes events, oldest first; waits for the first one.

        Args:
            max_events: no more than this.
            timeout: seconds to wait; None for ever, 0 not at all.
        """
        with self._ready:
            self._ready.wait_for(lambda: bool(self._events) or self._ended, timeout)
            was_paused = self.is_paused
            count = min(max_events, len(self._events))
            taken = [self._events.popleft() for _ in range(count)]
        if was_paused and taken:
            self._on_room()
        return taken

    def cancel(self) -> None:
        """Ends the answer at the next token; the session stays."""
        self.cancelled = True
        self._on_room()

    def accept_prompt(self, choices: Sequence[Choice]) -> None:
        """Takes tokens of the prompt that the engine has read, for who asked for them."""
        for choice in choices:
            self._put(PromptEvent(choice.token, choice.logprob, choice.top))

    def accept(self, choice: Choice, position: int) -> None:
        """Takes the engine's next token; may end the answer."""
        self._tokens += 1
        token, offset = choice.token, self._chars
        if token in self._end_ids or token in self._eos_ids:
            self._put(TokenEvent(position, token, "", choice.logprob, choice.top, offset))
            self.end("stop", stop=token if token in self._end_ids else None)
            return
        text, stop = self._text.push(token), None
        self._chars += len(text)
        if self._tokens > self.params.min_tokens:
            text, stop = self._stops.push(text)
        self._put(TokenEvent(position, token, text, choice.logprob, choice.top, offset))
        if stop is not None:
            self.end("stop", stop=stop)
        elif self._tokens == self.params.max_tokens:
            self.end("length")

    def end(
        self, reason: EndReason, *, stop: str | int | None = None, message: str | None = None
    ) -> None:
        """Closes the answer with what was held back."""
        held = ""
        if not isinstance(stop, str):  # what it cuts off in a character is U+FFFD
            held = self._stops.flush() + self._text.flush()
        self._ended = True
        self._put(EndEvent(reason, stop, held, self._prompt_tokens, self._tokens, message))

    def _put(self, event: Event) -> None:
        with self._ready:
            self._events.append(event)
            self._ready.notify_all()
        try:
            if self.notify is not None:
                self.notify()
        except Exception:
            log.exception("nobody can be told of the answer: it is cancelled")
            self.notify = None
            self.cancel()
