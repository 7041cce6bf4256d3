"""The least that serves the same vectors: FastAPI and uvicorn in one process, as a peer.

    python benchmarks/serving/plain_app.py --artifact demo-out/encoder --port 8001

It has our decoder and our encoder, decodes in threads, and runs one forward pass at a time on what
has come meanwhile. It has no limits, no typed errors, no second replica and no metrics.
"""

from __future__ import annotations

import asyncio
import base64
import pathlib
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

if __name__ == "__main__" and not __package__:  # so that it runs from an uninstalled checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

import numpy as np
import tyro
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.serving.model import forward_threads
from serve.embeddings.media.inputs import to_input
from serve.embeddings.replica.embedder import Encoder
from serve.embeddings.settings import ServeSettings


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is served, and with how many threads."""

    artifact: str
    """Folder of an exported artifact."""
    port: int
    """Port on loopback."""
    dtype: str = "fp32"
    """fp32 or bf16."""
    threads: int = 2
    """Torch threads."""
    decode_threads: int = 2
    """Decoder threads."""
    batch_size: int = 32
    """Images in one forward pass at most."""


class Body(BaseModel):
    """One image as a data URI; `encoding_format` is base64 whatever is asked for."""

    input: str
    encoding_format: str = "base64"


class Model:
    """Decodes in threads, and encodes in one more thread what waits."""

    def __init__(self, config: Config) -> None:
        dtype: Any = config.dtype
        self._forward = forward_threads(1, config.threads)
        self._encoder = Encoder(ServeSettings(artifact=config.artifact, dtype=dtype))
        self._decoders = ThreadPoolExecutor(config.decode_threads)
        self._queue: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()
        self._batch_size = config.batch_size

    async def embed(self, uri: str) -> bytes:
        """Returns the unit vector of an image, float32 and little-endian."""
        loop = asyncio.get_running_loop()
        decoded = await loop.run_in_executor(self._decoders, self._decode, uri)
        future: asyncio.Future[Any] = loop.create_future()
        self._queue.put_nowait((decoded.input, future))
        vector_D = await future
        return bytes((vector_D / np.linalg.norm(vector_D)).astype("<f4").tobytes())

    async def run(self) -> None:
        """Runs batch after batch."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            while len(batch) < self._batch_size and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            forward = partial(self._encoder.run, [(one, "mean") for one, _ in batch])
            vectors = await loop.run_in_executor(self._forward, forward)
            for (_, future), vector_D in zip(batch, vectors, strict=True):
                future.set_result(vector_D)

    def _decode(self, uri: str) -> Any:
        data = base64.b64decode(uri.partition(",")[2])
        return to_input(data, self._encoder.preprocessing, max_pixels=10**8, param="input")


def make_app(config: Config) -> FastAPI:
    """Returns the application."""
    model = Model(config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(model.run())
        yield
        running.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/embeddings")
    async def embeddings(body: Body) -> dict[str, Any]:
        vector = base64.b64encode(await model.embed(body.input)).decode()
        return {"object": "list", "data": [{"object": "embedding", "embedding": vector}]}

    return app


if __name__ == "__main__":
    _config = tyro.cli(Config)
    uvicorn.run(make_app(_config), port=_config.port, access_log=False)
