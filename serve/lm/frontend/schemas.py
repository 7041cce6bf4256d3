"""Request bodies of the language model's routes, in OpenAI's form.

Unknown fields are refused. `null` means "not given", because OpenAI's clients send it for that;
only for `max_tokens` of a streamed completion it means "until cancelled".
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from models.sink_lm.engine.sampling_params import SamplingParams
from serve.ingress.bodies import RequestModel
from serve.lm.contract import is_session_id
from serve.lm.frontend.neutral_fields import MESSAGE, REQUEST, Tolerant
from serve.replicas.model_routes import ModelEntry

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_ID_DIGITS = 18
"""Digits of a token id that is a key of `logit_bias` at most; 64 bits need no more."""

TokenIds = list[Annotated[int, Field(ge=0)]]
Stop = Annotated[str, Field(max_length=256)]


def _stop_list(value: Any) -> Any:
    """Turns one string into a list of it, and drops empty strings, which stop nothing."""
    stops = [value] if isinstance(value, str) else value
    return [stop for stop in stops if stop != ""] if isinstance(stops, list) else stops


def _drawn_afresh(seed: int | None) -> int | None:
    """Turns -1 into no seed, as vLLM and llama.cpp do."""
    return None if seed == -1 else seed


class StreamOptions(RequestModel):
    """Options of a streamed reply."""

    include_usage: bool = False
    """Send one more chunk at the end, with the usage and without choices."""
    continuous_usage_stats: bool = False
    """With `include_usage`, send the usage so far in every chunk, as vLLM does."""
    include_obfuscation: bool = False
    """OpenAI's field; ignored, because no chunk is padded."""


class Generate(Tolerant):
    """Fields of both completions and chat."""

    neutral = REQUEST

    model: str | None = None
    """A name from `GET /v1/models`; may be left out."""
    stream: bool = False
    """Reply with server-sent events."""
    stream_options: StreamOptions = StreamOptions()
    """Options of a streamed reply."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens to generate at most; without it, a streamed chat has no limit."""
    n: int = Field(1, ge=1)
    """Number of answers to the prompt; more than one only without a session."""
    stop: Annotated[
        list[Stop],
        Field(max_length=MAX_STOPS),
        BeforeValidator(_stop_list, json_schema_input_type=str | list[str]),
    ] = Field([])
    """One string, or up to 16, that end the answer and are not part of it."""
    temperature: float = Field(1.0, ge=0, le=2)
    """Divides the logits before sampling; 0 always takes the likeliest token."""
    top_p: float = Field(1.0, ge=0, le=1)
    """Sample from the likeliest tokens that together have this probability; 0 keeps only one."""
    top_k: Annotated[int, Field(ge=-1), AfterValidator(lambda top_k: max(top_k, 0))] = 0
    """Sample from this many of the likeliest tokens; 0 and -1 mean all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Sample from tokens that have at least this share of the likeliest token's probability."""
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63), AfterValidator(_drawn_afresh)] = None
    """Makes sampling repeatable; -1 means no seed."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({})
    """Numbers to add to the logits, by token id."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtracted from the logit of every token that has been generated."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtracted from a token's logit for each time it has been generated."""
    stop_token_ids: TokenIds = Field([])
    """Tokens that end the answer, besides the model's own end token."""
    ignore_eos: bool = False
    """Continue after the model's end token."""
    min_tokens: int = Field(0, ge=0)
    """Tokens to generate before an end token is allowed."""
    user: str | None = None
    """OpenAI's field; ignored."""
    session_id: str | None = None
    """The session to continue; the header `X-Session-ID` does the same."""
    resume_at: int | None = Field(None, ge=0)
    """For a session and without a prompt: send what the stream has after this position, then
    continue."""

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
    """Text or token ids; without a session also a list of these. Empty continues a session."""
    max_tokens: int | None = Field(None, ge=0)
    """Tokens to generate at most; `null` with `stream` generates until cancelled, 0 with `echo`
    generates nothing."""
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    """Return log probabilities of the tokens, and of this many of the likeliest ones."""
    echo: bool = False
    """Begin the reply with the prompt, and with its log probabilities if `logprobs` asks for them;
    not in a session."""
    add_special_tokens: bool = True
    """Begin a text with the start token, if the model was trained with one."""
    parse_special: bool = False
    """Read the text of a control token (`<|im_start|>`) as that token; llama.cpp's field."""

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
    """A text of a message whose content is a list, as OpenAI's may be."""

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
        """Returns the message as chat templates read it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatRequest(Generate):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field([])
    """The messages; with a session only the new ones, and none continues its last answer."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """OpenAI's newer name for `max_tokens`."""
    logprobs: bool = False
    """Return log probabilities of the tokens."""
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    """With `logprobs`, return those of this many of the likeliest tokens too."""

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
    """Begin a prompt with the start token; chat templates add their own."""
    parse_special: bool = False
    """Read the text of a control token in a prompt as that token."""
    add_generation_prompt: bool = True
    """End messages with the beginning of the assistant's turn."""
    return_token_strs: bool = False
    """Return each token as text, too."""

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
    """The session's name; generated by default."""
    sink_tokens: int | None = Field(None, ge=0)
    """Tokens at the start of the stream that are never evicted."""
    pin_prefix: str | list[Message] | None = None
    """Text or messages at the start of the stream, whose tokens are its sinks."""
    ttl_s: float | None = Field(None, gt=0)
    """Idle seconds after which the session is deleted."""

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
    """The new session's name; generated by default."""

    @model_validator(mode="after")
    def _name(self) -> Self:
        if self.session_id is not None and not is_session_id(self.session_id):
            raise ValueError(f"session_id: {self.session_id!r} cannot be a session's name")
        return self


class Model(ModelEntry):
    """What `GET /v1/models` tells of a language model."""

    modality: Literal["text"] = "text"
    max_model_len: None = None
    """There is no limit to a stream."""
    capacity: int
    """Tokens that a session sees at most."""
    sinks: int
    """Sink tokens of a session that does not set them."""
    sessions: int
    """Sessions that one replica holds in memory."""
    bytes_per_session: int
    """Size of a session's keys and values."""
    persistent: bool
    """Whether sessions outlive their replica."""
