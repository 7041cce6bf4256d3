"""What the ingress and the replicas of `LanguageModel` send each other.

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
"""Last tokens of a stream that a replica keeps in memory, to see how the stream ended."""


_AT = "@"
"""Before the name of a replica; no name of a session begins with it."""


def key_of_replica(name: str) -> str:
    """Returns the key by which calls go to this replica and no other."""
    return f"{_AT}{name}"


def named_replica(key: str) -> str | None:
    """Returns the replica that a key names; None if the key leads to a place on the ring."""
    return key.removeprefix(_AT) if key.startswith(_AT) else None


def is_session_id(name: str) -> bool:
    """Whether a session may have this name, which becomes a file name."""
    return _SESSION_ID.fullmatch(name) is not None


@dataclass(frozen=True, kw_only=True)
class LMCard:
    """What the ingress needs to know about the model behind it.

    Attributes:
        name: the name that clients use.
        created: Unix time of loading.
        vocab_size: token ids are below it.
        capacity: tokens that a session sees at most.
        sinks: sink tokens of a session that does not set them.
        sessions: slabs of one replica.
        bytes_per_session: size of a session's keys and values.
        fingerprint: names weights, cache shape and tokenizer.
        persistent: whether sessions outlive their replica.
        model: where its files are, for the tokenizer.
        release: digest of all that a prompt is prepared by: fingerprint, name, tokenizer, template.
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
    model: str = ""
    release: str = ""


@dataclass(frozen=True)
class Refusal:
    """What a replica returns for tokens that were made for another model.

    Attributes:
        card: the model that it serves.
    """

    card: LMCard


@dataclass(frozen=True, kw_only=True)
class Feed:
    """The tokens of a prompt, for every state that the stream may be in.

    A chat turn must first end the turn before it. Only the session knows how much of that end the
    stream already has: all of it, the end token alone, or nothing after a cancel.

    Attributes:
        start: tokens for an empty stream.
        follow: tokens for a stream that goes on; a chat turn's begin with `ending`.
        ending: tokens with which the template ends an assistant's turn.
        problem: why no stream can go on with this prompt; an empty stream still takes it.
    """

    start: tuple[int, ...]
    follow: tuple[int, ...] = ()
    ending: tuple[int, ...] = ()
    problem: str = ""

    def after(self, position: int, tail: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the tokens to feed to a stream of `position` tokens that ends with `tail`."""
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
        request_id: names the request, for `take` and `cancel`. A repeated call has the same one, so
            that its prompt is not appended twice.
        session_id: the session; None generates in temporary ones.
        feeds: the prompts. With a session there is one, or none to go on with the stream.
        params: how to generate.
        n: answers to each prompt; more than one only without a session.
        resume_at: first send what the stream has after this position, then generate. `max_tokens`
            counts from this position.
        goes_on: with `resume_at`, whether the reader of this very request comes back because its
            replica was lost. It is refused if another request has gone on with the session since.
        release: `LMCard.release` of the model that the feeds were made for; empty without feeds.
    """

    request_id: str
    session_id: str | None
    feeds: tuple[Feed, ...]
    params: SamplingParams
    n: int = 1
    resume_at: int | None = None
    goes_on: bool = False
    release: str = ""


@dataclass(frozen=True, kw_only=True)
class SessionState:
    """Description of a session.

    Attributes:
        id: its name.
        stream_position: tokens of the stream, prompts and answers together.
        cached_tokens: how many of them the next token can see.
        evicted_tokens: how many it cannot.
        sinks: tokens at the start that are never evicted.
        answer_from: position at which the latest answer begins.
        status: `generating`, `idle` (with its keys and values in memory) or `stored` (only).
        ttl_s: idle seconds until it is deleted; None keeps it.
        snapshot_position: position of the newest stored snapshot.
        owner_epoch: how often a replica has opened it.
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
    """Reply to `Start`: the answer is being generated.

    Attributes:
        prompt_tokens: tokens that are fed now.
        cached_tokens: tokens that the session had in its cache before.
        session: the session as it will be after the prompt; None for temporary ones.
        position: stream position at which the answer begins (or goes on).
        replica: name of the replica that generates it; empty where replicas have no names.
    """

    prompt_tokens: int
    cached_tokens: int
    session: SessionState | None
    position: int
    replica: str = ""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The new tokens of one choice since the last call, and its end if it has ended."""

    index: int
    tokens: tuple[Token, ...]
    end: End | None = None

    @property
    def made(self) -> int:
        """Number of tokens that were generated, without the prompt's."""
        return sum(not token.in_prompt for token in self.tokens)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What is new in a request's choices since the last call; no pieces if nothing is."""

    pieces: tuple[Piece, ...] = ()
    session: SessionState | None = None
