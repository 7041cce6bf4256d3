"""Arguments of `serve.app:build_app`: typed, with a default for everything but the artifact.

`serve run serve.app:build_app key=value ...` sends every value as text; `serve/config.yaml` sends
YAML values. Both land here, and a key that is not here is refused by name.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from serve.ingress.settings import ApplicationSettings, split_list

# [private:]host[:port]; a leading dot means "any subdomain of", a lone * any public host.
_HOST_RULE = re.compile(
    r"^(private:)?(\*|\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(:\d{1,5})?$"
)


def _split_hosts(value: object) -> object:
    """Turns the command line's `a.org,b.org` into a list, and checks every entry's shape."""
    hosts = split_list(value)
    if isinstance(hosts, tuple):
        for host in hosts:
            if not _HOST_RULE.match(host):
                raise ValueError(f"{host!r} is not `[private:]host[:port]`")
    return hosts


class ServeSettings(ApplicationSettings):
    """What to serve, how it batches, and every limit."""

    artifact: str = Field(min_length=1)
    """Folder or `s3://` prefix of an exported artifact (`python -m pipelines.export`)."""
    model: str | None = Field(None, min_length=1)
    """Name clients ask for; None takes the artifact folder's name."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations in the forward pass; embeddings are float32 either way."""
    batch_size: int = Field(32, ge=1)
    """Images in one forward pass at most."""
    max_wait_ms: float = Field(2.0, ge=0)
    """How long an idle embedder waits for company before it starts a batch that is not full."""
    threads: int | None = Field(None, ge=1)
    """Torch threads of an embedder on CPU; None takes every core the process may use."""
    decode_threads: int = Field(2, ge=1)
    """Threads of an ingress replica that decode and resize images."""
    decode_processes: int = Field(2, ge=0)
    """Videos that an ingress replica decodes at once, each in a process of its own; 0 refuses
    videos."""
    decode_memory_mib: int = Field(1024, ge=64)
    """Memory that decoding one video may take; more is a 400."""
    decode_timeout_s: float = Field(15.0, gt=0)
    """Seconds that decoding one video may take; more is a 400 and the process is killed."""

    max_replicas: int | None = None
    """Autoscale between `num_replicas` and this many embedder replicas; None keeps `num_replicas`."""
    target_ongoing: float = Field(8.0, gt=0)
    """Requests in flight per embedder replica that autoscaling aims at."""

    max_request_bytes: int = Field(67_108_864, ge=1)
    """Bytes of one request body; more is a 413, read no further."""
    max_image_bytes: int = Field(20_971_520, ge=1)
    """Encoded bytes of one image, inline or fetched; more is a 413."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Pixels of one image; more is a 400, decided from its header."""
    max_items: int = Field(64, ge=1)
    """Images in one request."""
    max_queued: int = Field(256, ge=1)
    """Images an ingress replica holds at once, waiting or running; more is a 429."""
    max_video_bytes: int = Field(33_554_432, ge=1)
    """Encoded bytes of one video, inline or fetched; more is a 413."""
    max_video_pixels: int = Field(8_912_896, ge=1)
    """Pixels of one frame of a video (the default: 4096 x 2176); more is a 400."""
    max_video_s: float = Field(600.0, gt=0)
    """Seconds of one video; more is a 400."""
    max_source_frames: int = Field(100_000, ge=1)
    """Frames that a video may hold, whether they are decoded or not; more is a 400."""
    max_video_frames: int = Field(128, ge=1)
    """Frames sampled from one video; more, by `fps`, is a 400."""
    video_frames: int = Field(16, ge=1)
    """Frames that an image encoder samples from a video; an encoder of clips has its own number."""
    max_queued_videos: int = Field(32, ge=1)
    """Videos an ingress replica holds at once, waiting, decoding or running; more is a 429."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds for one request, body and fetches included; then a 504."""

    max_streams: int = Field(256, ge=0)
    """WebSocket streams that an ingress replica serves at once; more are refused with code 1013."""
    max_stream_decoders: int = Field(8, ge=0)
    """Streams among them that arrive as a container and need a decoder process each."""
    stream_queue: int = Field(32, ge=1)
    """Frames that a stream holds before it drops some; a client may ask for fewer."""
    stream_idle_s: float = Field(60.0, gt=0)
    """A stream that brings nothing for this long is closed."""
    stream_urls: bool = False
    """Open streams by http(s) URL for clients, from `allow_hosts` only."""

    allow_hosts: Annotated[tuple[str, ...], BeforeValidator(_split_hosts)] = ()
    """Hosts images and videos may be fetched from; empty turns fetching off. `cdn.example.org` is that host,
    `.example.org` its subdomains, `*` any public host; `:port` allows a port beside 80 and 443;
    `private:` in front also allows addresses that are not public."""
    fetch_timeout_s: float = Field(10.0, gt=0)
    """Seconds for one fetch, redirects included."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_items > self.max_queued:
            raise ValueError(f"max_items ({self.max_items}) exceeds max_queued ({self.max_queued})")
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError("max_replicas is less than num_replicas")
        if self.max_image_bytes > self.max_request_bytes:
            raise ValueError("max_image_bytes exceeds max_request_bytes")
        if self.stream_urls and not self.allow_hosts:
            raise ValueError("stream_urls needs allow_hosts")
        return self
