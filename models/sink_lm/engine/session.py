"""A session as the engine knows it, and as others see it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from models.sink_lm.engine.generation import Generation


class UnknownSession(KeyError):
    """No such session here."""


class SessionExists(ValueError):
    """A session of that name is here already."""


class SessionBusy(RuntimeError):
    """The session is generating."""


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    """A session, seen from outside.

    Attributes:
        position: tokens in the stream.
        cached_tokens: of those, the ones in the cache or about to be.
        evicted_tokens: the others.
        sinks: tokens at the start that stay.
        window: recent tokens a new one sees besides itself.
        bytes: of its slab.
        busy: whether it generates.
        idle_s: seconds since it last did anything.
    """

    position: int
    cached_tokens: int
    evicted_tokens: int
    sinks: int
    window: int
    bytes: int
    busy: bool
    idle_s: float


@dataclass
class Session:
    """What the engine remembers of a session, besides its slab.

    Attributes:
        slot: number of its slab.
        pending: accepted tokens that the model has not read.
        generation: the answer being made, if any.
        used_at: `time.monotonic` of the last token or request.
    """

    slot: int
    pending: deque[int] = field(default_factory=deque)
    generation: Generation | None = None
    used_at: float = field(default_factory=time.monotonic)

    @property
    def busy(self) -> bool:
        """Whether it generates."""
        return self.generation is not None

    @property
    def has_prompt(self) -> bool:
        """Whether the next tick may read more of its prompt."""
        is_paused = self.generation is not None and self.generation.is_paused
        return len(self.pending) > 1 and not is_paused

    def end_if_read(self) -> bool:
        """Ends an answer of no tokens, whose prompt is read but for the last one."""
        if self.generation is None or not self.generation.output.wants_nothing:
            return False
        self.generation.end("length")
        self.generation = None
        return True

    @property
    def is_running(self) -> bool:
        """Whether the next tick has work for it."""
        generation = self.generation
        return generation is not None and (generation.cancelled or not generation.is_paused)
