"""What an answer consists of, as plain values: its tokens and its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error", "lost"]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, or one of the prompt where its log probabilities were asked for.

    Attributes:
        position: tokens in the stream, this one included; 0 in the prompt.
        token: its id.
        text: what became readable with it. Empty within a character, within a possible stop string
            and in the prompt.
        logprob: its log probability in nats, if asked for; None for the first token of a stream.
        top: the likeliest (id, log probability), likeliest first.
        offset: characters of the answer before the first one that it has a part in.
        in_prompt: whether it is one of the prompt's.
    """

    position: int
    token: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0
    in_prompt: bool = False


@dataclass(frozen=True, kw_only=True)
class End:
    """Why a generation ended.

    Attributes:
        reason: `stop` (an end token or a stop string), `length` (`max_tokens` are reached),
            `cancelled`, `error`, or `lost` (the replica no longer has the generation).
        stop: the stop string or token of the request that ended it, if one did.
        text: text that was held back and is part of the answer.
        message: what failed, for `error` and `lost`.
    """

    reason: FinishReason
    stop: str | int | None = None
    text: str = ""
    message: str = ""
