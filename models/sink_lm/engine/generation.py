"""One answer that is being generated: its sampler and a bounded queue towards its reader."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from models.sink_lm.engine.output import End, FinishReason, Token
from models.sink_lm.engine.output_processor import OutputProcessor
from models.sink_lm.engine.sampling import Choice, Sampler
from models.sink_lm.engine.sampling_params import SamplingParams

log = logging.getLogger(__name__)

Event = Token | End


class Generation:
    """Handed to whoever asked for the answer; thread-safe.

    Args:
        params: how to generate.
        output: makes the text and decides where the answer ends.
        vocab_size: token ids are below it.
        max_buffered: events that may wait unread; a full queue pauses the session.
        on_room: called when a full queue has room again, and on a cancel.

    Raises:
        ValueError: the parameters name a token that does not exist.
    """

    def __init__(
        self,
        params: SamplingParams,
        output: OutputProcessor,
        *,
        vocab_size: int,
        max_buffered: int,
        on_room: Callable[[], None],
    ) -> None:
        self.params, self.output = params, output
        self.sampler = Sampler(
            params, vocab_size, banned=output.end_ids, banned_for=output.min_left
        )
        self.notify: Callable[[], None] | None = None
        """Called within a tick when there are events to take. If it raises, the reader is gone."""
        self.cancelled = False
        self._max_buffered, self._on_room = max_buffered, on_room
        self._events: deque[Event] = deque()
        self._ready = threading.Condition()
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the answer has ended; its last events may still wait to be taken."""
        return self._ended

    @property
    def done(self) -> bool:
        """Whether the answer has ended and every event was taken."""
        return self._ended and not self._events

    @property
    def is_paused(self) -> bool:
        """Whether so many events wait for the reader that the session must pause."""
        return len(self._events) >= self._max_buffered

    def take(self, max_events: int = 64, timeout: float | None = 0.0) -> list[Event]:
        """Takes events, oldest first; waits for the first one.

        Args:
            max_events: no more than this.
            timeout: seconds to wait; None waits for ever, 0 not at all.
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
        """Ends the answer at the next token boundary; the session stays."""
        self.cancelled = True
        self._on_room()

    def accept_prompt(self, choices: Sequence[Choice]) -> None:
        """Takes tokens of the prompt that the engine has read, for a request that reports them."""
        for choice in choices:
            self._put(Token(0, choice.token, "", choice.logprob, choice.top, in_prompt=True))

    def accept(self, choice: Choice, position: int) -> None:
        """Takes the engine's next token, which may end the answer."""
        self._put(self.output.push(choice, position))
        if self.output.end is not None:
            self._close(self.output.end)

    def end(self, reason: FinishReason, *, message: str = "") -> None:
        """Ends the answer with the text that was held back."""
        self._close(self.output.finish(reason, message=message))

    def _close(self, end: End) -> None:
        self._ended = True
        self._put(end)

    def _put(self, event: Event) -> None:
        with self._ready:
            self._events.append(event)
            self._ready.notify_all()
        try:
            if self.notify is not None:
                self.notify()
        except Exception:
            log.exception("the answer's reader is gone: the answer is cancelled")
            self.notify = None
            self.cancel()
