"""Request bodies of the language model's routes, in the OpenAI shape.

A field that is not named here is refused. `null` means "not given", as OpenAI's clients send it,
except for the `max_tokens` of a streamed completion, where it means "until cancelled".
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from models.sink_lm.engine.sampling_params import SamplingParams
from serve.ingress.bodies import RequestModel
from serve.lm.contract import is_session_id
from serve.lm.frontend.neutral_fields import MESSAGE, REQUEST, Tolerant

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_ID_DIGITS = 18
"""Of a token id written as a key: enough for 64 bits."""

TokenIds = list[Annotated[int, Field(ge=0)]]
Stop = Annotated[str, Field(max_length=256)]


def _stop_list(value: Any) -> Any:
    """One string stands for a list of it; an empty one stops nothing."""
    stops = [value] if isinstance(value, str) else value
    return [stop for stop in stops if stop != ""] if isinstance(stops, list) else stops


def _drawn_afresh(seed: int | None) -> int | None:
    """-1 is no seed, as vLLM and llama.cpp have it."""
    return None if seed == -1 else seed


class StreamOptions(RequestModel):
    """Options of a streamed reply."""

    include_usage: bool = False
    """Send one more chunk, with the usage and no choices."""
    continuous_usage_stats: bool = False
    """With `include_usage`: the usage so far in every chunk, as vLLM sends it."""
    include_obfuscation: bool = False
    """OpenAI's field; ignored: no chunk is padded."""


class Generate(Tolerant):
    """What completions and chat have in common."""

    neutral = REQUEST

    model: str | None = None
    """A name from `GET /v1/models`; may be left out."""
    stream: bool = False
    """Reply with server-sent events."""
    stream_options: StreamOptions = StreamOptions()
    """Only with `stream`."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens to generate at most; `null` with `stream` goes on until cancelled."""
    n: int = Field(1, ge=1)
    """Answers to the same prompt; more than one only without a session."""
    stop: Annotated[
        list[Stop],
        Field(max_length=MAX_STOPS),
        BeforeValidator(_stop_list, json_schema_input_type=str | list[str]),
    ] = Field([])
    """One string or up to 16 that end the answer; not part of it."""
    temperature: float = Field(1.0, ge=0, le=2)
    """0 takes the likeliest token."""
    top_p: float = Field(1.0, ge=0, le=1)
    """Keep the likeliest tokens that have this much probability together; 0 keeps the likeliest."""
    top_k: Annotated[int, Field(ge=-1), AfterValidator(lambda top_k: max(top_k, 0))] = 0
    """Keep this many of the likeliest tokens; 0 and -1 keep all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Keep tokens at least this likely, relative to the likeliest."""
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63), AfterValidator(_drawn_afresh)] = None
    """Makes sampling repeatable; -1 draws afresh, as if there were none."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({})
    """Added to the logits of these token ids."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtracted from the logits of tokens that were generated."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtracted once for each time a token was generated."""
    stop_token_ids: TokenIds = Field([])
    """Tokens that end the answer, beside the model's own end token."""
    ignore_eos: bool = False
    """Go on after the model's end token."""
    min_tokens: int = Field(0, ge=0)
    """Tokens before an end token may come."""
    user: str | None = None
    """OpenAI's field; ignored."""
    session_id: str | None = None
    """The session to go on with; also as the header `X-Session-ID`."""
    resume_at: int | None = Field(None, ge=0)
    """Session only: send what the stream has after this position, then go on; no prompt."""

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Returns the sampler's parameters, each of them a field of the body of the same name.

        Args:
            max_tokens: the limit after defaults; completions and chat have different ones.
            logprobs: likeliest tokens to report; completions and chat spell it differently.
        """
        converted: dict[str, Any] = {
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "prompt_logprobs": logprobs if self.reports_prompt else None,
            "stop": tuple(self.stop),
            "stop_token_ids": tuple(self.stop_token_ids),
            "logit_bias": {int(token): bias for token, bias in self.logit_bias.items()},
        }
        names = {field.name for field in fields(SamplingParams)} - converted.keys()
        return SamplingParams(**converted, **{name: getattr(self, name) for name in names})

    @property
    def reports_prompt(self) -> bool:
        """Whether the reply has the prompt's tokens too."""
        return False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options.include_usage and not self.stream:
            raise ValueError("stream_options: only with stream")
        if self.session_id is not None and not is_session_id(self.session_id):
            raise ValueError(
                "session_id: 1 to 128 letters, digits and _ . : -, beginning with a letter or digit"
            )
        for token in self.logit_bias:
            if not token.isascii() or not token.isdigit() or len(token) > MAX_ID_DIGITS:
                raise ValueError(f"logit_bias: {token[:40]!r} is not a token id")
        return self


class CompletionRequest(Generate):
    """Body of `POST /v1/completions`."""

    null_means_something: ClassVar[frozenset[str]] = frozenset({"max_tokens"})

    prompt: str | TokenIds | list[str] | list[TokenIds] = ""
    """Text or token ids; without a session also a list of those. Empty with a session goes on."""
    max_tokens: int | None = Field(None, ge=0)
    """See `Generate`; 0, with `echo`, generates nothing."""
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Log probabilities of the tokens, and of so many of the likeliest."""
    echo: bool = False
    """Begin the reply with the prompt, with `logprobs` with those of its tokens too; not in a
    session."""
    add_special_tokens: bool = True
    """Begin a text as the model's streams begin: with its start token, if it is trained with one."""
    parse_special: bool = False
    """Read control tokens written out in a text (`<|im_start|>`) as such; llama.cpp's field."""

    @property
    def reports_prompt(self) -> bool:
        """Whether the reply has the prompt's tokens too."""
        return self.echo

    @model_validator(mode="after")
    def _something_to_do(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 only with echo: true, which sends the prompt back")
        return self


class TextPart(Tolerant):
    """A piece of a message in OpenAI's list form."""

    neutral = MESSAGE

    type: Literal["text"]
    text: str


class Message(Tolerant):
    """One message of a chat."""

    neutral = MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    """OpenAI's field; ignored."""

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatRequest(Generate):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field([])
    """With a session only the new ones; none goes on with the answer."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool = False
    """Log probabilities of the tokens."""
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    """And of so many of the likeliest; needs `logprobs`."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        given = {"max_tokens", "max_completion_tokens"} <= self.model_fields_set
        if given and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_completion_tokens: differs from max_tokens; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs: true")
        return self


class TokenizeRequest(RequestModel):
    """Body of `POST /v1/tokenize`: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    """Begin as a stream begins (prompt only; a template has its own)."""
    parse_special: bool = False
    """Read control tokens written out in the prompt as such."""
    add_generation_prompt: bool = True
    """End messages where the assistant begins."""
    return_token_strs: bool = False
    """Also each token as text."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeRequest(RequestModel):
    """Body of `POST /v1/detokenize`."""

    model: str | None = None
    tokens: TokenIds


class CreateSession(RequestModel):
    """Body of `POST /v1/sessions`."""

    model: str | None = None
    session_id: str | None = None
    """Its name; made up by default."""
    sink_tokens: int | None = Field(None, ge=0)
    """Tokens at the start of the stream that are never evicted."""
    pin_prefix: str | list[Message] | None = None
    """Text or messages that begin the stream and are its sinks."""
    ttl_s: float | None = Field(None, gt=0)
    """Idle seconds until it is deleted."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sink_tokens is not None and self.pin_prefix is not None:
            raise ValueError("sink_tokens: the tokens of pin_prefix are the sinks; give one")
        if self.session_id is not None and not is_session_id(self.session_id):
            raise ValueError(f"session_id: {self.session_id!r} cannot be a session's name")
        return self


class ForkSession(RequestModel):
    """Body of `POST /v1/sessions/{id}/fork`."""

    session_id: str | None = None
    """The new session's name; made up by default."""

    @model_validator(mode="after")
    def _name(self) -> Self:
        if self.session_id is not None and not is_session_id(self.session_id):
            raise ValueError(f"session_id: {self.session_id!r} cannot be a session's name")
        return self
