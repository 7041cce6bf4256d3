"""The tiny language model served on Ray, and requests to it over HTTP."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.lm.serving import MODEL
from helpers.serve.embeddings import miss_killed_replicas_soon
from helpers.waiting import LIMIT_S

APP = f"lm{os.getpid()}"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


@dataclass(frozen=True)
class Served:
    url: str
    store: Path


@contextmanager
def serve_tiny_lm(url: str, model: Path, store: Path) -> Iterator[Served]:
    """One replica and one ingress on the Serve that listens at `url`."""
    from ray import serve as ray_serve

    from serve import lm_app
    from serve.lm.settings import LMSettings

    settings = LMSettings(
        model=str(model),
        store=str(store),
        sessions=3,
        cache=32,
        prefill_chunk=16,
        threads=1,
        cpus=0.1,
        ingress_cpus=0.1,
        snapshot_every=50,
        max_choices=3,
        max_queued=0,
        ping_s=0.3,
        reader_timeout_s=2 * LIMIT_S,  # what a test waits for shall not come about by it
        max_reply_tokens=400,
        max_prompt_tokens=2_000,
        max_request_bytes=100_000,
        max_stream_bytes=20_000_000,
    )
    with pytest.MonkeyPatch.context() as patch:
        miss_killed_replicas_soon(patch, lm_app)
        ray_serve.run(lm_app.build_app(settings), name=APP)
    yield Served(url, store)
    ray_serve.delete(APP)


def complete(http: httpx.Client, **body: Any) -> Any:
    reply = http.post("/v1/completions", json=GREEDY | body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(reply: Any) -> str:
    return str(reply["choices"][0]["text"])


def endless(http: httpx.Client, session_id: str | None, **more: Any) -> Any:
    body = GREEDY | {"prompt": "and then", "max_tokens": None, "ignore_eos": True, "stream": True}
    extra = {"session_id": session_id} if session_id else {}
    return http.stream("POST", "/v1/completions", json=body | extra | more)


def complete_retrying(http: httpx.Client, **body: Any) -> Any:
    deadline = time.monotonic() + 60
    while True:
        reply = http.post("/v1/completions", json=GREEDY | {"ignore_eos": True} | body)
        if reply.status_code == 200 or time.monotonic() > deadline:
            assert reply.status_code == 200, reply.text
            return reply.json()
        time.sleep(0.3)


class CountsPings(httpx.HTTPTransport):
    """Looks at the bytes that the client reads."""

    def __init__(self) -> None:
        super().__init__()
        self.pings = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        reply = super().handle_request(request)
        assert isinstance(reply.stream, httpx.SyncByteStream)
        return httpx.Response(
            reply.status_code,
            headers=reply.headers,
            stream=Counted(reply.stream, self),
            extensions=reply.extensions,
        )


class Counted(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, counts: CountsPings) -> None:
        self._stream, self._counts = stream, counts

    def __iter__(self) -> Iterator[bytes]:
        for data in self._stream:
            self._counts.pings += data.count(b": ping\n")
            yield data

    def close(self) -> None:
        self._stream.close()
