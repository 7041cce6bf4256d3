"""Renders chat messages with the model's template, at the start of a stream or after a turn."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from models.sink_lm.checkpoints.tokenizer import Tokenizer
from serve.lm.contract import Feed

Messages = Sequence[Mapping[str, str]]

_CANNOT = "this model's template cannot put these messages after earlier ones"


def render_chat(tokenizer: Tokenizer, messages: Messages, start: tuple[int, ...]) -> Feed:
    """Returns the tokens of messages that begin a stream, and of the same after an earlier turn.

    For the second, the messages are rendered after an invented exchange, whose answer is a word
    that occurs nowhere else, and everything up to that word is cut off. So neither the template's
    default system prompt nor its start tokens are sent again, whatever the template puts around an
    answer (Qwen3's drops the reasoning from all answers but the last). How an answer ends is found
    by rendering the exchange alone.

    Args:
        tokenizer: the model's tokenizer.
        messages: `role` and `content` of each message.
        start: tokens of the messages at the start of a stream.
    """
    word = _unused_word(messages)
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": word}]
    try:
        alone = _after(word, tokenizer, tokenizer.chat(exchange, add_generation_prompt=False))
        follow = _after(word, tokenizer, tokenizer.chat([*exchange, *messages]))
    except ValueError as error:
        return Feed(start=start, problem=f"{_CANNOT}: {error}")
    if alone is None or follow is None:
        return Feed(start=start, problem=_CANNOT)
    pairs = zip(alone, follow, strict=False)
    ending = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    # A model generates the end token itself, but not a space that a template puts before it.
    cut = next((at for at, token in enumerate(ending) if token in tokenizer.eos_ids), 0)
    return Feed(start=start, follow=tuple(follow[cut:]), ending=tuple(ending[cut:]))


def _unused_word(messages: Messages) -> str:
    everything = "".join(text for message in messages for text in message.values())
    words = (f"answer{number}x" for number in itertools.count())
    return next(word for word in words if word not in everything)


def _after(word: str, tokenizer: Tokenizer, ids: Sequence[int]) -> list[int] | None:
    """Returns the tokens after a word; None if the template has left the word out."""
    parts = [tokenizer.token_bytes(token) for token in ids]
    ends, data = list(itertools.accumulate(map(len, parts))), b"".join(parts)
    at = data.find(word.encode())
    if at < 0:
        return None
    first = next(i for i, end in enumerate(ends) if end >= at + len(word))
    return list(ids[first + 1 :])
