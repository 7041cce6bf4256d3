"""What passes between the LM ingress and the replicas of `LanguageModel`.

Everything here is a plain value, so that an ingress replica imports neither the model nor torch. A
refusal is an `ApiError` that a method returns: raised, it would arrive wrapped in an error of Ray's
and be logged as a crash.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from models.sink_lm.engine.output import End, Token
from models.sink_lm.engine.sampling_params import SamplingParams

LANGUAGE_MODEL = "LanguageModel"
"""Name of the deployment."""

_SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}")

TAIL = 8
"""Last tokens of a stream that a replica keeps in mind, to see how the stream ended."""


def is_session_id(name: str) -> bool:
    """Whether a client may call a session that: it becomes a file name."""
    return _SESSION_ID.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class LMCard:
    """What the ingress needs to know about the model behind it.

    Attributes:
        name: what clients call it.
        created: Unix time of loading.
        vocab_size: token ids are below it.
        capacity: tokens a session sees at most.
        sinks: sink tokens of a session that does not choose.
        sessions: slabs of one replica.
        bytes_per_session: of keys and values.
        fingerprint: of weights, cache shape and tokenizer.
        persistent: whether sessions outlive their replica.
    """

    name: str
    created: int
    vocab_size: int
    capacity: int
    sinks: int
    sessions: int
    bytes_per_session: int
    fingerprint: str
    persistent: bool


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The tokens of a prompt, for whatever state the stream is in.

    A chat turn that follows another must first end it, and how much of that end is there already
    (all, the end token only, nothing after a cancel) only the session knows.

    Attributes:
        start: what begins an empty stream.
        follow: what goes on; begins with `ending` where the prompt is a chat turn.
        ending: how the template ends an assistant's turn.
        problem: why nothing can go on with it: then only an empty stream takes it.
    """

    start: tuple[int, ...]
    follow: tuple[int, ...] = ()
    ending: tuple[int, ...] = ()
    problem: str = ""

    def after(self, position: int, tail: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens to feed to a stream of `position` tokens that ends with `tail`."""
        if position == 0:
            return self.start
        for there in range(min(len(self.ending), len(tail)), 0, -1):
            if tail[-there:] == self.ending[:there]:
                return self.follow[there:]
        return self.follow


@dataclass(frozen=True, kw_only=True)
class Start:
    """A request to generate.

    Attributes:
        request_id: names the answer, for `take` and `cancel`. The same with every repeated call, so
            that a prompt is not appended twice.
        session_id: the session, or None for temporary ones.
        feeds: the prompts; one with a session, none to go on.
        params: how to generate.
        n: answers to each prompt; more than one only without a session.
        resume_at: send what the stream has after this position, then go on; `max_tokens` counts
            from there.
        goes_on: with `resume_at`, the reader of this very request resumes it after its replica was
            lost. That takes over from nobody: whom another request has replaced is refused.
    """

    request_id: str
    session_id: str | None
    feeds: tuple[Feed, ...]
    params: SamplingParams
    n: int = 1
    resume_at: int | None = None
    goes_on: bool = False


@dataclass(frozen=True, kw_only=True)
class SessionState:
    """A session, seen from outside.

    Attributes:
        id: its name.
        stream_position: tokens of the stream, prompts and answers.
        cached_tokens: of those, the ones the next token can see.
        evicted_tokens: the others.
        sinks: tokens at the start that are never evicted.
        answer_from: position at which the latest answer begins.
        status: generating; idle with its keys in memory; or stored only.
        ttl_s: idle seconds until it is deleted.
        snapshot_position: of the newest stored snapshot.
        owner_epoch: how many replicas have opened it.
    """

    id: str
    stream_position: int
    cached_tokens: int
    evicted_tokens: int
    sinks: int
    answer_from: int = 0
    status: Literal["generating", "idle", "stored"] = "idle"
    ttl_s: float | None = None
    snapshot_position: int | None = None
    owner_epoch: int | None = None


@dataclass(frozen=True, kw_only=True)
class Started:
    """An answer that is being made.

    Attributes:
        prompt_tokens: tokens that are fed now.
        cached_tokens: tokens the session had in its cache before.
        session: as it will be once they are in; None for temporary ones.
        position: stream position at which the answer begins (or goes on).
    """

    prompt_tokens: int
    cached_tokens: int
    session: SessionState | None
    position: int


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one choice of an answer has made since the last call."""

    index: int
    tokens: tuple[Token, ...]
    end: End | None = None

    @property
    def made(self) -> int:
        """Tokens that were generated."""
        return sum(not token.in_prompt for token in self.tokens)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What an answer has made since the last call; no pieces where nothing is new."""

    pieces: tuple[Piece, ...] = ()
    session: SessionState | None = None
