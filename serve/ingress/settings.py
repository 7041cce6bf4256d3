"""Settings that every application has: its replicas, request bodies, browsers and the API key."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from models.file_systems import check_protocol

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#@\[\]:]+)(:\d{1,5})?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def split_list(value: object) -> object:
    """Turns `a,b` from the command line, or a list, into a tuple of lower-case words."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return parts
    return tuple(part for part in (str(part).strip().lower() for part in parts) if part)


def _origins(value: object) -> object:
    origins = split_list(value)
    if not isinstance(origins, tuple):
        return origins
    origins = tuple(origin.removesuffix("/") for origin in origins)
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(f"{origin!r} is not an origin, `https://host[:port]` without a path")
    return origins


def _understood(place: str) -> str:
    check_protocol(place)
    return place


Stored = Annotated[str, Field(min_length=1), AfterValidator(_understood)]
"""A folder or file, local or at an address that an installed file system understands."""


class ApplicationSettings(BaseModel):
    """Settings of every application: its replicas and its HTTP side."""

    # Text from an environment variable or a YAML block often ends in a line break.
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, str_strip_whitespace=True
    )

    num_replicas: int = Field(1, ge=1)
    """Model replicas."""
    cpus: float = Field(1.0, ge=0)
    """CPUs that Ray reserves for each model replica (a reservation; `threads` is what is used)."""
    gpus: float = Field(0.0, ge=0)
    """GPUs for each model replica; 0 runs on CPU."""
    ingress_replicas: int = Field(1, ge=1)
    """HTTP replicas, which do everything that needs no model."""
    ingress_cpus: float = Field(0.5, ge=0)
    """CPUs that Ray reserves for each ingress replica."""
    drain_s: float = Field(65.0, gt=0)
    """Seconds that a replica which Serve stops, for an update or to scale down, may take to finish
    what it has begun; Serve's `graceful_shutdown_timeout_s`."""
    replica_silence_s: float = Field(15.0, gt=0)
    """Seconds without an answer of a model replica after which another one is asked, or the replica
    is asked whether it is alive. Ray itself takes about a minute to miss a machine."""
    body_timeout_s: float = Field(10.0, gt=0)
    """Seconds without a byte of a body until the reply is a 408; a body that has taken longer than
    this at less than 1024 bytes a second gets a 408 too."""
    max_request_bytes: int = Field(8_388_608, ge=1)
    """Bytes of one request body at most; a longer one is a 413 and is not read to its end."""
    max_arriving_bytes: int | None = None
    """Bytes of all bodies that are arriving at an ingress replica at the same time; more is a 429.
    None means 16 times `max_request_bytes`."""
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_origins)] = ()
    """Origins whose web pages may call this server from a browser, such as
    `https://app.example.org`; `*` allows any page, and an empty list none."""
    api_key_env: str | None = None
    """Name of the environment variable of the ingress replicas that holds the API key; None serves
    anyone. A replica does not start if the variable is unset or holds what no client can send."""
    access_log: bool = False
    """Write one log line for each request, by Ray Serve (costs throughput)."""

    @model_validator(mode="after")
    def _takes_one(self) -> Self:
        if self.max_arriving_bytes is not None and self.max_arriving_bytes < self.max_request_bytes:
            raise ValueError("max_arriving_bytes is less than max_request_bytes")
        return self

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not _VARIABLE.fullmatch(name):
            raise ValueError("give the name of an environment variable, not the key itself")
        return name


class PlacedSettings(ApplicationSettings):
    """Settings of an application whose model may run in its HTTP replicas."""

    placement: Literal["separate", "together"] = "separate"
    """Where the model runs. `separate`: in replicas of its own, which the HTTP replicas call; the
    two scale by themselves, and a request outlives a model replica that dies. `together`: in the
    HTTP replicas, of which there are `num_replicas` with `cpus` and `gpus` each; a request has one
    process fewer to go through, and fails if that dies."""

    @model_validator(mode="after")
    def _placed(self) -> Self:
        stray = sorted({"ingress_replicas", "ingress_cpus"} & self.model_fields_set)
        if self.placement == "together" and stray:
            message = "with placement=together there are no replicas for HTTP alone; set"
            instead = stray[0].replace("ingress_replicas", "num_replicas").removeprefix("ingress_")
            raise ValueError(f"{stray[0]}: {message} {instead}, or placement=separate")
        return self
