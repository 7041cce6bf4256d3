"""What may be shown of an answer: nothing that its session's log does not have."""

from __future__ import annotations

from collections import deque

from models.sink_lm.engine.generation import EndEvent, TokenEvent
from models.sink_lm.engine.sampling_params import SamplingParams
from serve.lm.replica.generations import Source
from serve.lm.replica.resident_session import Held
from serve.lm.replica.text import AnswerText
from serve.lm.store.token_log import MemoryLog


class SlowLog(MemoryLog):
    """Stores later than it is written to, as on S3."""

    durable = 0


class Made:
    """A generation that has made all it will."""

    ended = True

    def __init__(self, count: int) -> None:
        tokens = [TokenEvent(n + 1, ord("a") + n, chr(ord("a") + n)) for n in range(count)]
        self._events: deque[TokenEvent | EndEvent] = deque(tokens)
        self._events.append(EndEvent("length", None, "", 0, count))

    def take(self, max_events: int, timeout: float) -> list[TokenEvent | EndEvent]:
        return [self._events.popleft() for _ in range(min(max_events, len(self._events)))]


class Letters:
    eos_ids = ()

    def stream(self) -> Letters:
        return self

    def push(self, token: int) -> str:
        return chr(token)


def test_tokens_are_shown_once_they_are_stored() -> None:
    log = SlowLog()
    held = Held(session_id="s", sinks=0, ttl_s=None, log=log)
    text = AnswerText(Letters(), SamplingParams(max_tokens=4), (), answered=0)  # type: ignore[arg-type]
    source = Source("s", Made(4), held=held, text=text)  # type: ignore[arg-type]
    assert source.take(64) == ([], None)
    shown = []
    for durable in (1, 1, 3, 4):
        log.durable = durable
        tokens, end = source.take(64)
        shown.append("".join(token.text for token in tokens))
        assert (end is not None) == (durable == 4)
    assert shown == ["a", "", "bc", "d"]
    assert source.ended
