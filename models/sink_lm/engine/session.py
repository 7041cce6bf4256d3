"""A session inside the engine, and its description for others."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from models.sink_lm.engine.drafts import Drafter
from models.sink_lm.engine.generation import Generation
from models.sink_lm.network.cache import Slabs


class UnknownSession(KeyError):
    """There is no session of that name."""


class SessionExists(ValueError):
    """There is a session of that name already."""


class SessionBusy(RuntimeError):
    """The session is generating."""


@dataclass(frozen=True, kw_only=True)
class SessionInfo:
    """Description of a session.

    Attributes:
        position: tokens in the stream.
        cached_tokens: how many of them are in the cache or about to be.
        evicted_tokens: how many are not.
        sinks: tokens at the start of the stream that are never evicted.
        window: recent tokens that a new one sees besides itself and the sinks.
        bytes: size of its slab.
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
    """The engine's record of a session, besides its slab.

    Attributes:
        slot: number of its slab.
        pending: accepted tokens that the model has not read yet.
        prefix: the stream's first tokens, at most as many as it has sinks; empty where they are not
            known (a restored session).
        drafter: guesses its next tokens; None where the engine does not.
        generation: the answer that it generates, if any.
        used_at: `time.monotonic` of the last token or request.
    """

    slot: int
    pending: deque[int] = field(default_factory=deque)
    prefix: list[int] = field(default_factory=list)
    drafter: Drafter | None = None
    generation: Generation | None = None
    used_at: float = field(default_factory=time.monotonic)

    @property
    def busy(self) -> bool:
        """Whether it generates."""
        return self.generation is not None

    def position(self, slabs: Slabs) -> int:
        """Returns the tokens in the stream."""
        return slabs.length(self.slot) + len(self.pending)

    def describe(self, slabs: Slabs) -> SessionInfo:
        """Returns the description for others."""
        sinks, position = slabs.sinks(self.slot), self.position(slabs)
        cached = min(position, slabs.capacity - 1)
        return SessionInfo(
            position=position,
            cached_tokens=cached,
            evicted_tokens=position - cached,
            sinks=sinks,
            window=slabs.capacity - 1 - sinks,
            bytes=slabs.bytes_per_session,
            busy=self.busy,
            idle_s=0.0 if self.busy else time.monotonic() - self.used_at,
        )

    @property
    def has_prompt(self) -> bool:
        """Whether the next tick may read more of its prompt."""
        is_paused = self.generation is not None and self.generation.is_paused
        return len(self.pending) > 1 and not is_paused

    def end_if_read(self) -> bool:
        """Ends an answer that asks for no tokens, once its prompt is read but for the last one."""
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
