"""The sessions that a planner remembers: as many as fit, and none for long.

What is remembered makes the next search start from what is left of the last plan, and tells how
surprising an observation is. Nothing else depends on it, so it may be forgotten at any time.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from serve.planning.contract import Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """What the last plan of a session left."""

    goal: str
    """Digest of the goal's picture; with another goal the session begins anew."""
    rest_KA: Floats
    """The plan without its first action."""
    expected_D: Floats
    """The latent that is expected now."""
    step: int
    """Plans so far."""


class SessionTable:
    """Sessions by name.

    Args:
        most: sessions at most.
        ttl_s: idle seconds after which one is forgotten.
        clock: returns seconds.

    Attributes:
        crowded_out: sessions that were forgotten for want of room.
    """

    def __init__(
        self, most: int, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._ttl_s, self._clock = most, ttl_s, clock
        self._sessions: OrderedDict[str, tuple[float, Session]] = OrderedDict()
        self.crowded_out = 0

    def __len__(self) -> int:
        self._forget_idle()
        return len(self._sessions)

    def find(self, name: str, goal: str) -> Session | None:
        """Returns a session; None if it is unknown, forgotten, or had another goal."""
        self._forget_idle()
        _, session = self._sessions.get(name, (0.0, None))
        return session if session is not None and session.goal == goal else None

    def keep(self, name: str, session: Session) -> None:
        """Remembers a session, as the one that was used last."""
        self._sessions[name] = (self._clock(), session)
        self._sessions.move_to_end(name)
        self._forget_idle()
        while len(self._sessions) > self._most:
            self._sessions.popitem(last=False)
            self.crowded_out += 1

    def forget(self, name: str) -> None:
        """Forgets a session, if there is one."""
        self._sessions.pop(name, None)

    def _forget_idle(self) -> None:
        since = self._clock() - self._ttl_s
        while self._sessions and next(iter(self._sessions.values()))[0] < since:
            self._sessions.popitem(last=False)
