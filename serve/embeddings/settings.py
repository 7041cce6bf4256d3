"""Arguments of `serve.app:build_app`: typed, with a default for everything but the artifact.

`serve run serve.app:build_app key=value ...` passes every value as text, `serve/config.yaml` passes
YAML values. Both are validated here, and an unknown key is refused by name.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from serve.ingress.settings import PlacedSettings, Stored, split_list

# [private:]host[:port]; a leading dot means "any subdomain of", a lone * any public host.
_HOST_RULE = re.compile(
    r"^(private:)?(\*|\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(:\d{1,5})?$"
)


def _split_hosts(value: object) -> object:
    """Turns `a.org,b.org` from the command line into a tuple and checks every entry."""
    hosts = split_list(value)
    if isinstance(hosts, tuple):
        for host in hosts:
            if not _HOST_RULE.match(host):
                raise ValueError(f"{host!r} is not `[private:]host[:port]`")
    return hosts


class ServeSettings(PlacedSettings):
    """Settings of the embeddings application: the artifact, batching and all limits."""

    artifact: Stored
    """Folder or `s3://` prefix of an exported artifact (`python -m pipelines.export`)."""
    model: str | None = Field(None, min_length=1)
    """The model's name in requests; None takes the name of the artifact's folder."""
    align: Stored | None = None
    """File of `pipelines.align` or `pipelines.adapt`, local or `s3://`, that maps all features
    before they are normalised, so that old probes read them."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and activations in the forward pass; embeddings are float32 either way."""
    batch_size: int = Field(32, ge=1)
    """Images or clips that an embedder computes at the same time at most: in one forward pass on a
    GPU, and on CPU in up to four side by side, which share the threads."""
    max_wait_ms: float = Field(2.0, ge=0)
    """Milliseconds that an idle embedder waits for more images before it runs a batch that is not
    full. After a batch of a single image it does not wait: a client alone has no company."""
    threads: int | None = Field(None, ge=1)
    """Torch threads of an embedder on CPU; None takes every core that the process may use."""
    decode_threads: int = Field(2, ge=1)
    """Threads of an ingress replica for decoding and resizing images."""
    decode_processes: int = Field(2, ge=0)
    """Videos that an ingress replica decodes at the same time, each in its own process; 0 refuses
    videos."""
    decode_memory_mib: int = Field(1024, ge=64)
    """MiB of memory that decoding one video may take; more is a 400."""
    decode_timeout_s: float = Field(15.0, gt=0)
    """Seconds that decoding one video may take; after that the process is killed and the reply is a
    400."""

    max_replicas: int | None = None
    """Autoscale between `num_replicas` and this many embedder replicas; None does not autoscale."""
    target_ongoing: float = Field(8.0, gt=0)
    """Requests in progress on each embedder replica that autoscaling aims at."""

    max_request_bytes: int = Field(67_108_864, ge=1)
    """Bytes of one request body at most; a longer one is a 413 and is not read to its end."""
    max_image_bytes: int = Field(20_971_520, ge=1)
    """Encoded bytes of one image, sent or fetched; more is a 413."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Pixels of one image; more is a 400, decided from the image's header."""
    max_items: int = Field(64, ge=1)
    """Images and videos in one request at most; more is a 400."""
    max_queued: int = Field(256, ge=1)
    """Images that an ingress replica may have waiting or in progress; more is a 429."""
    max_video_bytes: int = Field(33_554_432, ge=1)
    """Encoded bytes of one video, sent or fetched; more is a 413."""
    max_video_pixels: int = Field(8_912_896, ge=1)
    """Pixels of one frame of a video (by default 4096 x 2176); more is a 400."""
    max_video_s: float = Field(600.0, gt=0)
    """Duration of one video in seconds; more is a 400."""
    max_source_frames: int = Field(100_000, ge=1)
    """Frames that a video file may hold, decoded or not; more is a 400."""
    max_video_frames: int = Field(128, ge=1)
    """Frames that a request's `fps` may sample from one video; more is a 400."""
    video_frames: int = Field(16, ge=1)
    """Frames that an image encoder takes from a video; a video encoder takes its own number."""
    max_queued_videos: int = Field(32, ge=1)
    """Videos that an ingress replica may have waiting or in progress; more is a 429."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds for one request, with its body and fetches; then the reply is a 504."""

    max_streams: int = Field(256, ge=0)
    """WebSocket streams of an ingress replica at the same time; more are closed with code 1013."""
    max_stream_decoders: int = Field(8, ge=0)
    """How many of these streams may send a container, which needs a decoder process each."""
    stream_queue: int = Field(32, ge=1)
    """Frames that may wait in a stream before some are dropped; a client may ask for fewer."""
    stream_idle_s: float = Field(60.0, gt=0)
    """Seconds without a message after which a stream is closed."""
    stream_urls: bool = False
    """Whether clients may give the http(s) URL of a stream, on one of `allow_hosts`, to open."""

    allow_hosts: Annotated[tuple[str, ...], BeforeValidator(_split_hosts)] = ()
    """Hosts from which images and videos may be fetched; an empty list turns fetching off.
    `cdn.example.org` is that host, `.example.org` any subdomain, `*` any public host. `:port` at
    the end allows that port instead of 80 and 443; `private:` in front allows addresses that are
    not public, too."""
    fetch_timeout_s: float = Field(10.0, gt=0)
    """Seconds for one fetch, with its redirects."""

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
