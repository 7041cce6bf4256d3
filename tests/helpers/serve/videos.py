"""Serves a clip encoder over HTTP without Ray, with real decoder processes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn

from helpers.serve.fake_model import Parts
from helpers.serve.free_ports import free_ports
from helpers.waiting import LIMIT_S
from models.artifacts.artifact import load_artifact, save_artifact
from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import EncoderInput, Preprocessing, normalize
from serve.embeddings.contract import ModelCard
from serve.embeddings.frontend.service import EmbeddingService
from serve.embeddings.replica.embedder import Encoder
from serve.embeddings.settings import ServeSettings
from serve.embeddings.streams.stream import StreamHub
from serve.ingress.application import IngressParts
from serve.ingress.middleware import RequestMetrics
from serve.replicas.batching import Batcher
from serve.replicas.served_model import ServedModel

WIDTH, SIZE, FRAMES, TUBELET, PATCHES = 32, 32, 4, 2, 16


def save_clip_artifact(folder: Path) -> None:
    """A random clip encoder with weights large enough that clips differ."""
    torch.manual_seed(0)
    encoder = VisionTransformer(
        EncoderShape(
            image_size=SIZE,
            patch_size=SIZE // 4,
            width=WIDTH,
            depth=2,
            heads=2,
            frames=FRAMES,
            tubelet=TUBELET,
        )
    )
    for parameter in encoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    prep = Preprocessing(image_size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
    save_artifact(folder, encoder, prep, {"run": "test", "step": 0, "manifest_hash": ""})


@torch.inference_mode()
def direct_clip_tokens(folder: Path, pixels_THWC: np.ndarray) -> np.ndarray:
    """Computes the tokens [N, D] of one clip directly, without a server or a batch."""
    artifact = load_artifact(folder)
    prep = artifact.preprocessing
    clip_BCTHW = torch.from_numpy(pixels_THWC.copy()).permute(3, 0, 1, 2)[None]
    return artifact.encoder(normalize(clip_BCTHW, prep.mean, prep.std))[0].numpy()


@dataclass
class LocalServer:
    """A running server, as tests use it."""

    port: int
    parts: Parts
    loop: asyncio.AbstractEventLoop
    delay_s: float = 0.0
    """Seconds added to every forward pass."""
    batches: list[int] | None = None
    """Sizes of the batches that ran."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def local_server(
    artifact: Path, *, api_key: str | None = None, **settings: Any
) -> Iterator[LocalServer]:
    """Serves an artifact in a thread; the embedder's batcher runs in the same event loop."""
    full = ServeSettings(artifact=str(artifact), threads=1, **settings)
    (port,) = free_ports(1)
    started: dict[str, Any] = {}
    ready = threading.Event()

    async def main() -> None:
        parts, server = _build(full, api_key, started)
        config = uvicorn.Config(
            parts.app(),
            host="127.0.0.1",
            port=port,
            log_level="error",
            ws="websockets-sansio",
        )
        http = uvicorn.Server(config)
        started.update(http=http, server=server)
        task = asyncio.create_task(http.serve())
        while not http.started and not task.done():
            await asyncio.sleep(0.01)
        server.port = port
        ready.set()
        await task

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(LIMIT_S)
    yield started["server"]
    started["http"].should_exit = True
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def _build(
    settings: ServeSettings, api_key: str | None, started: dict[str, Any]
) -> tuple[Parts, LocalServer]:
    encoder = Encoder(settings)
    model = ServedModel(encoder.card)
    server = LocalServer(0, None, asyncio.get_running_loop(), batches=[])  # type: ignore[arg-type]

    async def run(items: list[Any]) -> list[Any]:
        server.batches.append(len(items))  # type: ignore[union-attr]
        await asyncio.sleep(server.delay_s)
        return await asyncio.to_thread(encoder.run, items)

    batcher = Batcher(run, batch_size=settings.batch_size, max_wait_s=0.002)

    async def embed(
        inputs: Sequence[EncoderInput], pooling: str, card: ModelCard
    ) -> list[np.ndarray]:
        return await asyncio.gather(*(batcher.submit((one, pooling)) for one in inputs))

    async def is_ready() -> bool:
        return True

    async def scrape() -> str:
        return ""

    metrics = RequestMetrics()
    service = EmbeddingService(settings, model, embed, metrics.registry)
    ingress = IngressParts(
        settings=settings, metrics=metrics, scrape=scrape, is_ready=is_ready, api_key=api_key
    )
    streams = StreamHub(settings, model, embed, service.media, metrics.registry)
    server.parts = Parts(ingress, service, streams)
    return server.parts, server
