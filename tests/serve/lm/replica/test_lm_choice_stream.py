"""Tokens are shown only after their session's log has stored them."""

from __future__ import annotations

from collections import deque

from models.sink_lm.engine.output import End, Token
from serve.lm.replica.generations import ChoiceStream
from serve.lm.replica.resident_session import ResidentSession
from serve.lm.store.token_log import MemoryLog


class SlowLog(MemoryLog):
    """A log that stores later than it is written to, as on S3."""

    durable = 0


class Made:
    """A generation that has ended."""

    ended = True

    def __init__(self, count: int) -> None:
        tokens = [Token(n + 1, ord("a") + n, chr(ord("a") + n)) for n in range(count)]
        self._events: deque[Token | End] = deque(tokens)
        self._events.append(End(reason="length"))

    def take(self, max_events: int, timeout: float) -> list[Token | End]:
        return [self._events.popleft() for _ in range(min(max_events, len(self._events)))]


def test_tokens_are_shown_once_they_are_stored() -> None:
    log = SlowLog()
    session = ResidentSession(session_id="s", sinks=0, ttl_s=None, log=log)
    choice = ChoiceStream("s", Made(4), session=session)  # type: ignore[arg-type]
    assert choice.take(64) == ([], None)
    shown = []
    for durable in (1, 1, 3, 4):
        log.durable = durable
        tokens, end = choice.take(64)
        shown.append("".join(token.text for token in tokens))
        assert (end is not None) == (durable == 4)
    assert shown == ["a", "", "bc", "d"]
    assert choice.ended
