"""Writes replies in OpenAI's form: whole replies and the chunks of a stream."""

from __future__ import annotations

import contextlib
import time
import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from models.sink_lm.engine.output import End, Token
from serve.lm.contract import SessionState, Started

TokenBytes = Callable[[int], bytes]


class ShownTokens:
    """Finds the tokens whose text is in the reply; those of a stop string never are.

    A token waits while its text waits: within a character, or while a stop string may have begun.
    """

    def __init__(self) -> None:
        self._waiting: deque[Token] = deque()
        self._chars = 0

    def push(self, tokens: Sequence[Token], end: End | None) -> list[Token]:
        """Adds a piece and returns the tokens whose text is in the reply from now on."""
        self._waiting.extend(tokens)
        self._chars += sum(len(token.text) for token in tokens) + len(end.text if end else "")
        ended_by_itself = end is not None and not isinstance(end.stop, str)
        shown = []
        while self._waiting and (ended_by_itself or self._is_shown(self._waiting[0])):
            shown.append(self._waiting.popleft())
        return shown

    def _is_shown(self, token: Token) -> bool:
        return token.in_prompt or token.offset < self._chars


class Choice:
    """One answer, assembled from its pieces.

    Args:
        keep_tokens: whether the reply has log probabilities of its tokens.
    """

    def __init__(self, *, keep_tokens: bool) -> None:
        self.text: list[str] = []
        self.tokens: list[Token] = []
        self.end: End | None = None
        self._shown = ShownTokens() if keep_tokens else None

    def add(self, tokens: Sequence[Token], end: End | None) -> None:
        """Adds a piece."""
        self.text.extend(token.text for token in tokens)
        if self._shown is not None:
            self.tokens.extend(self._shown.push(tokens, end))
        if end is not None:
            self.text.append(end.text)
            self.end = end


@dataclass(frozen=True)
class Echo:
    """A prompt that is sent back.

    Attributes:
        text: the whole prompt.
        offsets: where in the text each token begins; empty without log probabilities.
    """

    text: str
    offsets: tuple[int, ...] = ()


def usage(started: Started, completion_tokens: int) -> dict[str, Any]:
    """Returns OpenAI's usage; cached tokens are those that the session had already."""
    return {
        "prompt_tokens": started.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": started.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": started.cached_tokens},
    }


def session_fields(session: SessionState) -> dict[str, Any]:
    """Returns the fields that every reply has about its session."""
    names = ("id", "stream_position", "cached_tokens", "evicted_tokens")
    return {name: value for name, value in asdict(session).items() if name in names}


class Shape(ABC):
    """Makes the JSON of one reply.

    Args:
        model: the model's name.
        fingerprint: the model's fingerprint, OpenAI's `system_fingerprint`.
        token_bytes: returns the bytes of a token.
        logprobs: whether the reply has log probabilities.
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
        """Returns the chunks that begin a choice."""
        return []

    def chunk(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """Returns a chunk of text."""
        return self._chunk([self._delta(index, text, self._logprobs(index, tokens), None)])

    def last(self, index: int, end: End, tokens: Sequence[Token] = ()) -> dict[str, Any]:
        """Returns the chunk that ends a choice."""
        entry = self._delta(index, end.text, self._logprobs(index, tokens), finish_reason(end))
        return self._chunk([entry | {"stop_reason": end.stop}])

    def only_usage(self, counts: Any) -> dict[str, Any]:
        """Returns the additional chunk of `include_usage`."""
        return self._chunk([]) | {"usage": counts}

    def whole(self, choices: Sequence[Choice], counts: Any) -> dict[str, Any]:
        """Returns a reply that is not streamed."""
        entries = [self._whole_choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._common, "object": self.kind, "choices": entries, "usage": counts}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._common, "object": self.chunk_kind, "choices": choices}

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        end = choice.end or End(reason="length")
        return {
            "index": index,
            **self._content(index, "".join(choice.text)),
            "logprobs": self._logprobs(index, choice.tokens),
            "finish_reason": finish_reason(end),
            "stop_reason": end.stop,
        }

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return self._some_logprobs(index, tokens) if self.logprobs and tokens else None

    @abstractmethod
    def _delta(
        self, index: int, text: str, logprobs: Any, reason: str | None
    ) -> dict[str, Any]: ...

    @abstractmethod
    def _content(self, index: int, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _some_logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]: ...


class CompletionShape(Shape):
    """Replies of `/v1/completions`.

    Args:
        echoes: the prompt with which each choice begins; empty without `echo`.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any, logprobs: bool, echoes: Sequence[Echo] = ()) -> None:
        super().__init__(*args, logprobs=logprobs)
        self._echoes = echoes
        self._prompt_sent = [0] * len(echoes)  # tokens

    def first(self, index: int) -> list[dict[str, Any]]:
        """Returns the prompt with `echo`; with log probabilities it comes later, as it is read."""
        if not self._echoes or self.logprobs:
            return []
        return [self._chunk([self._delta(index, self._echoes[index].text, None, None)])]

    def chunk(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """Returns a chunk of text, which may be part of the prompt."""
        given = sum(token.in_prompt for token in tokens)
        if given:
            echo, start = self._echoes[index], self._prompt_sent[index]
            borders = (*echo.offsets, len(echo.text))
            text = echo.text[borders[start] : borders[start + given]] + text
        return super().chunk(index, text, tokens)

    def _delta(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _content(self, index: int, text: str) -> dict[str, Any]:
        return {"text": self._echoes[index].text + text if self._echoes else text}

    def _some_logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [self._key(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [self._offset(index, token) for token in tokens],
        }

    def _offset(self, index: int, token: Token) -> int:
        """Returns where in the reply's text a token begins; tokens of a prompt come in order."""
        if not self._echoes:
            return token.offset
        echo = self._echoes[index]
        if not token.in_prompt:
            return len(echo.text) + token.offset
        self._prompt_sent[index] += 1
        return echo.offsets[self._prompt_sent[index] - 1]

    def _top(self, token: Token) -> dict[str, float] | None:
        """Returns the likeliest tokens and the chosen one, each under a different name."""
        if token.logprob is None:
            return None
        found: dict[str, float] = {}
        for other, logprob in token.top:
            found[next(name for name in self._names(other) if name not in found)] = logprob
        if all(other != token.token for other, _ in token.top):
            name = next(name for name in self._names(token.token) if name not in found)
            found[name] = token.logprob
        return found

    def _key(self, token: int) -> str:
        return next(self._names(token))

    def _names(self, token: int) -> Iterator[str]:
        """Yields names of a token: its text unless it is no UTF-8, its bytes, its id.

        The first is OpenAI's name; the others are for tokens that would have the same name.
        """
        data = self._bytes(token)
        with contextlib.suppress(UnicodeDecodeError):
            yield data.decode()
        yield "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        yield f"token_id:{token}"


class ChatShape(Shape):
    """Replies of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> list[dict[str, Any]]:
        """Returns the chunk with the role."""
        delta = {"role": "assistant", "content": ""}
        entry = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return [self._chunk([entry])]

    def _delta(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text or reason is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _content(self, index: int, text: str) -> dict[str, Any]:
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
    """Returns OpenAI's word for why an answer ended."""
    return "stop" if end.reason == "stop" else "length"
