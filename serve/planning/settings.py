"""Arguments of `serve.planning_app:build_app`: typed, with a default for all but the agent.

`serve run serve.planning_app:build_app key=value ...` passes every value as text,
`serve/planning_config.yaml` passes YAML values. An unknown key is refused by name.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from serve.ingress.settings import PlacedSettings, Stored


class PlanningSettings(PlacedSettings):
    """Settings of the planning application: the agent, batching, sessions and all limits."""

    agent: Stored
    """Folder or `s3://` prefix of an agent, as `python -m pipelines.plan_episodes` writes it."""
    model: str | None = Field(None, min_length=1)
    """The agent's name in requests; None takes the name of its world."""

    batch_size: int = Field(32, ge=1)
    """Requests that a planner answers at the same time at most, in up to four batches side by side,
    which share the threads."""
    max_wait_ms: float = Field(2.0, ge=0)
    """Milliseconds that an idle planner waits for company before it runs a batch that is not full.
    After a batch of a single request it does not wait."""
    threads: int | None = Field(None, ge=1)
    """Torch threads of a planner; None takes every core that the process may use."""
    decode_threads: int = Field(2, ge=1)
    """Threads of an ingress replica for decoding and resizing images."""
    seed: int = Field(0, ge=0)
    """Seed of the searches of each planner."""

    max_budget: int = Field(20_000, ge=1)
    """Imagined steps that one plan may cost; a request that asks for more is a 400."""
    max_steps: int = Field(64, ge=1)
    """Actions of one prediction at most; more is a 400."""
    max_zones: int = Field(16, ge=0)
    """Zones of one request at most; more is a 400."""
    max_sessions: int = Field(4096, ge=1)
    """Sessions that a planner remembers. One more makes it forget the session that has been idle
    for longest, which then begins anew."""
    session_ttl_s: float = Field(600.0, gt=0)
    """Idle seconds after which a session is forgotten."""

    max_image_bytes: int = Field(4_194_304, ge=1)
    """Encoded bytes of one image; more is a 413."""
    max_pixels: int = Field(16_000_000, ge=1)
    """Pixels of one image; more is a 400, decided from the image's header."""
    max_queued: int = Field(256, ge=1)
    """Requests that an ingress replica may have in progress, and that may wait for a planner; more
    is a 429."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds for one request with its body; then the reply is a 504."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.gpus:
            raise ValueError(f"gpus is {self.gpus:g}, but planners run on CPUs; leave it at 0")
        if self.placement == "together" and self.num_replicas > 1:
            message = "a session would meet another planner with each request"
            raise ValueError(f"placement=together and num_replicas={self.num_replicas}: {message}")
        if self.max_image_bytes > self.max_request_bytes:
            raise ValueError("max_image_bytes exceeds max_request_bytes")
        return self
