"""Turns the body of a request into a `Start` for the replicas, without HTTP or Ray."""

from __future__ import annotations

import codecs
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from models.sink_lm.checkpoints.tokenizer import Tokenizer
from serve.ingress.errors import ApiError
from serve.lm.contract import Feed, LMCard, Start, is_session_id
from serve.lm.frontend.chat_template import render_chat
from serve.lm.frontend.reply_bodies import ChatShape, CompletionShape, Echo, Shape
from serve.lm.frontend.schemas import (
    ChatRequest,
    CompletionRequest,
    CreateSession,
    Generate,
    Message,
    TokenizeRequest,
)
from serve.lm.settings import LMSettings

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked request.

    Attributes:
        start: the call of the replica.
        shape: writes the reply.
        stream: whether the reply is streamed.
        include_usage: whether a stream ends with a chunk of its usage.
        usage_so_far: whether every chunk has the usage so far.
    """

    start: Start
    shape: Shape
    stream: bool
    include_usage: bool
    usage_so_far: bool

    @property
    def choices(self) -> int:
        """Number of answers."""
        return max(1, len(self.start.feeds) * self.start.n)


class LanguageService:
    """Checks requests and tokenizes their prompts.

    Args:
        settings: the limits.
        card: the model.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, settings: LMSettings, card: LMCard, tokenizer: Tokenizer) -> None:
        self.card, self.tokenizer = card, tokenizer
        self.settings = settings

    def completion(self, request: CompletionRequest, header: str | None) -> Job:
        """Returns the job of a completion; raises `ApiError` if the request is wrong."""
        session_id = self._session(request, header)
        prompts = self._prompts(request, session_id)
        feeds = tuple(self._text_feed(prompt, request) for prompt in prompts)
        limit = request.max_tokens
        is_endless = request.stream and "max_tokens" in request.model_fields_set
        if limit is None and not is_endless:
            limit = DEFAULT_COMPLETION_TOKENS
        echoes = self._echoes(request, session_id, prompts, feeds) if request.echo else ()
        start = self._start(request, session_id, feeds, limit, request.logprobs)
        return self._job(
            request,
            start,
            partial(CompletionShape, echoes=echoes),
            logprobs=request.logprobs is not None,
        )

    def chat(self, request: ChatRequest, header: str | None) -> Job:
        """Returns the job of a chat turn; raises `ApiError` if the request is wrong."""
        session_id = self._session(request, header)
        if not request.messages and session_id is None:
            raise ApiError(400, "empty_input", "messages: none, and no session", param="messages")
        if request.messages and request.resume_at is not None:
            raise _invalid("resume_at", "goes on with an answer; send no messages with it")
        kept = session_id is not None
        feeds = (self._chat_feed(request.messages, kept=kept),) if request.messages else ()
        limit = request.max_completion_tokens or request.max_tokens
        if limit is None and not request.stream:
            limit = self.settings.max_reply_tokens
        logprobs = request.top_logprobs if request.logprobs else None
        start = self._start(request, session_id, feeds, limit, logprobs)
        return self._job(request, start, ChatShape, logprobs=request.logprobs)

    def pinned(self, request: CreateSession) -> tuple[int, ...]:
        """Returns the token ids of a session's pinned prefix."""
        prefix = request.pin_prefix
        if prefix is None:
            return ()
        if isinstance(prefix, str):
            ids = self._text_feed(prefix, CompletionRequest(), "pin_prefix").start
        else:
            ids = self._template(prefix, "pin_prefix", add_generation_prompt=False)
            self._check_length(ids, "pin_prefix")
        limit = self.card.capacity - 2
        if len(ids) > limit:
            raise _invalid("pin_prefix", f"{len(ids)} tokens; 1 to {limit} can be pinned")
        return ids

    def check_model(self, name: str | None) -> None:
        """Raises a 404 for any name but the served model's."""
        if name is not None and name != self.card.name:
            message = f"the model {name!r} does not exist; this server has {self.card.name!r}"
            raise ApiError(404, "model_not_found", message, param="model")

    def check_tokens(self, ids: Sequence[int], param: str) -> None:
        """Raises a 400 for a token id that the model does not have."""
        for index, token in enumerate(ids):
            if token >= self.card.vocab_size:
                where = f"{param}[{index}]"
                raise _invalid(where, f"{token} is not below {self.card.vocab_size}")

    def tokenize(self, request: TokenizeRequest) -> Sequence[int]:
        """Returns the token ids of a text or of messages."""
        if request.messages is not None:
            opens = request.add_generation_prompt
            return self._template(request.messages, add_generation_prompt=opens)
        bos = request.add_special_tokens and self.tokenizer.adds_bos
        parse = request.parse_special
        return self.tokenizer.encode(request.prompt or "", bos=bos, parse_special=parse)

    def _session(self, request: Generate, header: str | None) -> str | None:
        self.check_model(request.model)
        session_id = request.session_id or header
        if request.session_id and header and request.session_id != header:
            raise _invalid("session_id", "differs from the header X-Session-ID")
        if session_id is not None and not is_session_id(session_id):
            raise _invalid("session_id", f"{session_id[:40]!r} cannot be a session's name")
        if session_id is not None and request.n > 1:
            raise _invalid("n", "a session has one stream; fork it for more answers")
        if session_id is None and request.resume_at is not None:
            raise _invalid("resume_at", "needs a session")
        return session_id

    def _prompts(self, request: CompletionRequest, session_id: str | None) -> list[Any]:
        """Returns the prompts as text or ids; none to continue a session."""
        prompt = request.prompt
        several = isinstance(prompt, list) and any(isinstance(part, str | list) for part in prompt)
        prompts: list[Any] = list(prompt) if several else [prompt]
        if several and session_id is not None:
            raise _invalid("prompt", "a session takes one prompt at a time")
        if not any(prompts) and session_id is not None:
            return []
        if request.resume_at is not None:
            raise _invalid("resume_at", "goes on with an answer; send no prompt with it")
        for index, part in enumerate(prompts):
            if not part:
                where = f"prompt[{index}]" if several else "prompt"
                raise ApiError(400, "empty_input", f"{where} is empty", param=where)
        return prompts

    def _text_feed(
        self, prompt: str | list[int], request: CompletionRequest, param: str = "prompt"
    ) -> Feed:
        if isinstance(prompt, str):
            parse = request.parse_special
            ids = tuple(self.tokenizer.encode(prompt, bos=False, parse_special=parse))
            begins = request.add_special_tokens and self.tokenizer.adds_bos
            bos = self.tokenizer.bos_id if begins else None
            start = ids if bos is None else (bos, *ids)
        else:
            self.check_tokens(prompt, param)
            ids = start = tuple(prompt)  # ids are taken as they are
        if not start:
            raise ApiError(400, "empty_input", f"{param}: a text of no tokens", param=param)
        self._check_length(ids, param)
        return Feed(start=start, follow=ids)

    def _echoes(
        self,
        request: CompletionRequest,
        session_id: str | None,
        prompts: Sequence[Any],
        feeds: Sequence[Feed],
    ) -> tuple[Echo, ...]:
        """Returns the prompt of every choice, for replies that begin with it."""
        if session_id is not None:
            raise _invalid("echo", "a session's reply has what is new only")
        tokens = request.n * sum(len(feed.start) for feed in feeds)
        limit = self.settings.max_echo_tokens
        if request.logprobs is not None and tokens > limit:
            message = f"{tokens} prompt tokens with logprobs; this server sends {limit} back"
            raise _invalid("echo", message)
        each = (echo(self.tokenizer, p, f.start) for p, f in zip(prompts, feeds, strict=True))
        return tuple(one for one in each for _ in range(request.n))

    def _chat_feed(self, messages: Sequence[Message], *, kept: bool) -> Feed:
        """Returns the messages as the start of a stream and, for a session, as a later turn."""
        start = self._template(messages)
        self._check_length(start, "messages")
        if not kept:
            return Feed(start=start)
        return render_chat(self.tokenizer, [m.plain() for m in messages], start)

    def _template(
        self, messages: Sequence[Message], param: str = "messages", **how: bool
    ) -> tuple[int, ...]:
        if not messages:
            raise ApiError(400, "empty_input", f"{param}: no messages", param=param)
        plain = [message.plain() for message in messages]
        try:
            return tuple(self.tokenizer.chat(plain, **how))
        except ValueError as error:
            raise ApiError(400, "invalid_messages", str(error), param=param) from error

    def _check_length(self, ids: Sequence[int], param: str) -> None:
        limit = self.settings.max_prompt_tokens
        if len(ids) > limit:
            message = f"{param}: {len(ids)} tokens; this server takes {limit}"
            raise ApiError(400, "prompt_too_long", message, param=param)

    def _start(
        self,
        request: Generate,
        session_id: str | None,
        feeds: tuple[Feed, ...],
        limit: int | None,
        logprobs: int | None,
    ) -> Start:
        self._check_limits(request, len(feeds), limit)
        params = request.sampling_params(max_tokens=limit, logprobs=logprobs)
        self.check_tokens(tuple(params.logit_bias), "logit_bias")
        self.check_tokens(params.stop_token_ids, "stop_token_ids")
        return Start(
            request_id=uuid.uuid4().hex,
            session_id=session_id,
            feeds=feeds,
            params=params,
            n=request.n,
            resume_at=request.resume_at,
            release=self.card.release if feeds else "",
        )

    def _check_limits(self, request: Generate, prompts: int, limit: int | None) -> None:
        settings = self.settings
        if prompts * request.n > settings.max_choices:
            param = "n" if request.n > 1 else "prompt"
            raise _invalid(param, f"more than {settings.max_choices} answers in one request")
        if not request.stream and limit is not None and limit > settings.max_reply_tokens:
            message = f"more than {settings.max_reply_tokens} need stream: true"
            raise _invalid("max_tokens", message)
        if limit is not None and request.min_tokens > limit:
            raise _invalid("min_tokens", f"{request.min_tokens} exceed max_tokens {limit}")

    def _job(
        self, request: Generate, start: Start, kind: Callable[..., Shape], *, logprobs: bool
    ) -> Job:
        card, options = self.card, request.stream_options
        return Job(
            start=start,
            shape=kind(card.name, card.fingerprint, self.tokenizer.token_bytes, logprobs=logprobs),
            stream=request.stream,
            include_usage=options.include_usage,
            usage_so_far=options.include_usage and options.continuous_usage_stats,
        )


def echo(tokenizer: Tokenizer, prompt: str | Sequence[int], ids: Sequence[int]) -> Echo:
    """Returns a prompt's text, and where in it each token begins; ids are decoded."""
    decoder, pieces, starts, chars = codecs.getincrementaldecoder("utf-8")("replace"), [], [], 0
    for token in ids:
        starts.append(chars)
        if isinstance(prompt, str) or not tokenizer.is_special(token):
            pieces.append(decoder.decode(tokenizer.token_bytes(token)))
            chars += len(pieces[-1])
    if not isinstance(prompt, str):
        return Echo("".join(pieces) + decoder.decode(b"", final=True), tuple(starts))
    extra = chars - len(prompt)  # a start token, SentencePiece's first space
    return Echo(prompt, tuple(min(max(0, start - extra), len(prompt)) for start in starts))


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, "invalid_value", f"{param}: {message}", param=param)
