"""Arguments of `serve.lm_app:build_app`: typed, with a default for everything but the model.

`serve run serve.lm_app:build_app model=DIR key=value ...`, or `args` in serve/lm_config.yaml. A key
that is not here is refused by name.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from serve.ingress.settings import ApplicationSettings


class LMSettings(ApplicationSettings):
    """What to serve, how much of it, and every limit."""

    model: str = Field(min_length=1)
    """Hugging Face folder or hub id (safetensors), `.gguf` file, or a folder that holds one."""
    name: str | None = Field(None, min_length=1)
    """Name clients ask for; None takes the model's last path component."""
    store: str | None = Field(None, min_length=1)
    """Folder on all nodes, or fsspec URL (`s3://...`), where sessions are kept. None keeps them in
    memory: they then end with their replica, and none can be resumed or swapped out."""

    dtype: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    """Type of weights, keys and values; `int8` rounds the linear layers to 8 bits and keeps the rest
    in bf16 (docs/language_model.md has the numbers)."""
    sessions: int = Field(16, ge=1)
    """Slabs: sessions one replica can generate for at the same time."""
    cache: int = Field(1024, ge=2)
    """Tokens a session sees at most: sinks, window and the token being read. It is the `capacity` of
    docs/language_model.md, one more than the paper's cache."""
    sinks: int = Field(4, ge=0)
    """Sink tokens of a session that does not choose."""
    prefill_chunk: int = Field(256, ge=1)
    """Prompt tokens processed at once, between two decode steps of the other sessions."""
    threads: int | None = Field(None, ge=1)
    """Torch threads of a replica on CPU; None takes every core the process may use."""

    snapshot_every: int = Field(4096, ge=1)
    """Tokens between two snapshots of a session's keys and values."""
    session_ttl_s: float | None = Field(86_400.0, gt=0)
    """Idle seconds until a session is deleted (stored ones a few minutes later), unless it chose;
    None keeps them."""
    max_buffered: int = Field(64, ge=1)
    """Tokens a generation may be ahead of its reader before it pauses."""
    reader_timeout_s: float = Field(30.0, gt=0)
    """A generation that nobody reads for so long is cancelled (its ingress died)."""

    max_prompt_tokens: int = Field(1_000_000, ge=1)
    """Tokens of one prompt; more is a 400."""
    max_reply_tokens: int = Field(4096, ge=1)
    """Tokens of a reply that is not streamed, and its limit where none is given."""
    max_echo_tokens: int = Field(65_536, ge=0)
    """Prompt tokens, of all answers of one request, that are sent back with log probabilities
    (`echo` with `logprobs`); more is a 400."""
    max_choices: int = Field(8, ge=1)
    """Answers of one request: prompts times `n`."""
    max_stream_bytes: int | None = Field(16_777_216, ge=1)
    """Bytes of one streamed reply; then it ends with `length`, and a session goes on with
    `resume_at` at the last event's id. Bounds what a client that does not read costs
    (docs/language_model_http.md); None for no limit."""
    max_queued: int = Field(64, ge=0)
    """Requests of one replica that may wait for a slab; more are a 429, and with 0 all that find
    none."""
    queue_timeout_s: float = Field(60.0, gt=0)
    """Seconds a request waits for a slab; then a 429. The wait is part of `timeout_s`."""
    max_requests: int = Field(256, ge=1)
    """Requests an ingress replica holds at once."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds for a reply that is not streamed; then a 504."""
    ping_s: float = Field(15.0, gt=0)
    """Silence after which a stream sends a comment, so that proxies keep it open."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.sinks > self.cache - 2:
            raise ValueError(f"sinks ({self.sinks}) leave no window in a cache of {self.cache}")
        if self.num_replicas > 1 and self.store is None:
            raise ValueError(
                "num_replicas: several need a store, or sessions are lost when one comes or goes"
            )
        if self.max_choices > self.sessions:
            raise ValueError(f"max_choices ({self.max_choices}) exceeds sessions ({self.sessions})")
        return self
