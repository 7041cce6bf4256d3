"""Arguments of `serve.lm_app:build_app`: typed, with a default for everything but the model.

They are given as `serve run serve.lm_app:build_app model=DIR key=value ...` or as `args` in
serve/lm_config.yaml. An unknown key is refused by name.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from models.sink_lm.dtype_names import DTypeName, KernelsName
from serve.ingress.settings import ApplicationSettings, Stored


class LMSettings(ApplicationSettings):
    """Settings of the language model's application: the model, its memory and all limits."""

    model: str = Field(min_length=1)
    """Hugging Face folder or hub id (safetensors), a `.gguf` file, or a folder with one."""
    name: str | None = Field(None, min_length=1)
    """The model's name in requests; None takes the last part of the model's path."""
    store: Stored | None = None
    """Folder that all nodes share, or fsspec URL (`s3://...`), where sessions are stored. None
    keeps them in memory only: they end with their replica and cannot be resumed or swapped out."""

    dtype: DTypeName = "fp32"
    """Type of weights, keys and values. `int8` rounds the linear layers to 8 bits, `int4` keeps
    those of a GGUF file in the bits that they have, and both keep the rest in bf16. `auto` takes
    the fastest that suits the file and the processor (docs/language_model.md has the numbers).
    Replicas that share stored sessions need the same type: name it where processors differ."""
    kernels: KernelsName = "auto"
    """What decodes with `int4` weights: `native` is this project's own C++, which needs a processor
    with AVX-512 VNNI and is compiled when first needed; `torch` is torch's operators. `auto` takes
    the own ones where they can run, and says in the log why not (docs/language_model.md)."""
    sessions: int = Field(16, ge=1)
    """Sessions of a replica that can generate at the same time, each in a slab of memory."""
    cache: int = Field(1024, ge=2)
    """Tokens that a session sees at most: sinks, window and the token that is read. It is the
    `capacity` of docs/language_model.md, one more than the paper's cache."""
    sinks: int = Field(4, ge=0)
    """Sink tokens of a session whose request does not set them."""
    prefill_chunk: int = Field(256, ge=1)
    """Prompt tokens that are processed between two decode steps of the other sessions."""
    draft_tokens: int = Field(0, ge=0, le=32)
    """Tokens that are guessed from the stream's own past and checked in one step while a single
    session generates; 0 for none. Greedy tokens stay the same, and so does the distribution of
    sampled ones (docs/language_model.md)."""
    threads: int | None = Field(None, ge=1)
    """Torch threads of a replica on CPU; None takes every core that the process may use."""

    snapshot_every: int = Field(4096, ge=1)
    """Tokens from one stored snapshot of a session's keys and values to the next."""
    session_ttl_s: float | None = Field(86_400.0, gt=0)
    """Idle seconds after which a session is deleted (a stored one some minutes later), unless its
    request set another time; None deletes none."""
    max_buffered: int = Field(64, ge=1)
    """Tokens that a generation may be ahead of its reader before it pauses."""
    reader_timeout_s: float = Field(30.0, gt=0)
    """Seconds without a reader after which a generation is cancelled; its ingress has died."""

    max_prompt_tokens: int = Field(1_000_000, ge=1)
    """Tokens of one prompt at most; more is a 400."""
    max_reply_tokens: int = Field(4096, ge=1)
    """Tokens of a reply that is not streamed, at most and by default."""
    max_echo_tokens: int = Field(65_536, ge=0)
    """Prompt tokens that one request, over all its answers, may get back with log probabilities
    (`echo` with `logprobs`); more is a 400."""
    max_choices: int = Field(8, ge=1)
    """Answers of one request (prompts times `n`) at most."""
    max_stream_bytes: int | None = Field(16_777_216, ge=1)
    """Bytes of one streamed reply, after which it ends with `length`; a session can be resumed with
    `resume_at` at the last event's id. Bounds what a client that does not read costs
    (docs/language_model_http.md); None for no limit."""
    max_queued: int = Field(64, ge=0)
    """Requests of one replica that may wait for a slab; more are a 429. With 0, none waits."""
    queue_timeout_s: float = Field(60.0, gt=0)
    """Seconds that a request waits for a slab, then it is a 429. They count towards `timeout_s`."""
    max_requests: int = Field(256, ge=1)
    """Requests of an ingress replica in progress at the same time; more are a 429."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds for a reply that is not streamed; then it is a 504."""
    ping_s: float = Field(15.0, gt=0)
    """Seconds of silence after which a stream sends a comment, so that proxies keep it open."""

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
