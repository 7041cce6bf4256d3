"""OpenAI's shapes of what a model says: whole replies and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from serve.lm_contract import End, SessionState, Started, Token

TokenBytes = Callable[[int], bytes]


@dataclass
class Choice:
    """One answer, put together from its pieces."""

    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    end: End | None = None

    def add(self, tokens: Sequence[Token], end: End | None, *, keep_tokens: bool) -> None:
        """Takes a piece in."""
        self.text.extend(token.text for token in tokens)
        if keep_tokens:
            self.tokens.extend(tokens)
        if end is not None:
            self.text.append(end.text)
            self.end = end


def usage(started: Started, completion_tokens: int) -> dict[str, Any]:
    """OpenAI's usage; cached are the tokens of a session that were not sent again."""
    return {
        "prompt_tokens": started.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": started.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": started.cached_tokens},
    }


def session_fields(session: SessionState) -> dict[str, Any]:
    """What every reply says of its session."""
    names = ("id", "stream_position", "cached_tokens", "evicted_tokens")
    return {name: value for name, value in asdict(session).items() if name in names}


class Shape(ABC):
    """Makes the JSON of one reply.

    Args:
        model: the name it was asked for by.
        fingerprint: of the model, OpenAI's `system_fingerprint`.
        token_bytes: what a token stands for.
        logprobs: whether they were asked for.
    """

    prefix = ""
    kind = ""
    chunk_kind = ""

    def __init__(
        self, model: str, fingerprint: str, token_bytes: TokenBytes, *, logprobs: bool
    ) -> None:
        self._bytes, self.logprobs = token_bytes, logprobs
        self._common = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def first(self, index: int) -> list[dict[str, Any]]:
        """Chunks that open a choice."""
        return []

    def chunk(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk([self._delta(index, text, self._logprobs(index, tokens), None)])

    def last(self, index: int, end: End) -> dict[str, Any]:
        """The chunk that closes a choice."""
        entry = self._delta(index, end.text, None, finish_reason(end))
        return self._chunk([entry | {"stop_reason": end.stop}])

    def only_usage(self, counts: Any) -> dict[str, Any]:
        """The extra chunk of `include_usage`."""
        return self._chunk([]) | {"usage": counts}

    def whole(self, choices: Sequence[Choice], counts: Any) -> dict[str, Any]:
        """A reply that is not streamed."""
        entries = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._common, "object": self.kind, "choices": entries, "usage": counts}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._common, "object": self.chunk_kind, "choices": choices}

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        end = choice.end or End(reason="length")
        return {
            "index": index,
            **self._content("".join(choice.text)),
            "logprobs": self._logprobs(index, choice.tokens),
            "finish_reason": finish_reason(end),
            "stop_reason": end.stop,
        }

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return self._some_logprobs(index, tokens) if self.logprobs and tokens else None

    def _text(self, token: int) -> str:
        return self._bytes(token).decode(errors="replace")

    @abstractmethod
    def _delta(
        self, index: int, text: str, logprobs: Any, reason: str | None
    ) -> dict[str, Any]: ...

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _some_logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]: ...


class CompletionShape(Shape):
    """`text_completion`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, logprobs: bool) -> None:
        super().__init__(*args, logprobs=logprobs)
        self._offsets: Counter[int] = Counter()  # characters of each choice so far

    def _delta(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _some_logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token.text)
        return {
            "tokens": [self._text(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._text(other): logprob for other, logprob in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }


class ChatShape(Shape):
    """`chat.completion`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> list[dict[str, Any]]:
        """The role."""
        delta = {"role": "assistant", "content": ""}
        entry = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return [self._chunk([entry])]

    def _delta(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text or reason is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _some_logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        entries = [
            self._entry(token.token, token.logprob)
            | {"top_logprobs": [self._entry(other, logprob) for other, logprob in token.top]}
            for token in tokens
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self._bytes(token)
        return {
            "token": data.decode(errors="replace"),
            "logprob": logprob,
            "bytes": list(data),
        }


def finish_reason(end: End) -> str:
    """OpenAI's word for why an answer ended."""
    return "stop" if end.reason == "stop" else "length"
