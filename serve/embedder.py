"""The encoder replica: pixels in, embeddings out, in dynamic batches.

Shape legend: B images of a batch, H height, W width, C channels, N patches, D width.
"""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry, Counter, Histogram

from models.preprocessing import Preprocessing, normalize
from models.weights import load_artifact
from serve.batching import Batcher
from serve.contract import Floats, ModelCard, Pixels, Pooling
from serve.settings import ServeSettings
from serve.telemetry import BATCH_BUCKETS, LATENCY_BUCKETS_S, Reporter

STUCK_AFTER_S = 300.0
"""A forward pass that takes longer than this makes the health check fail and Serve restart us."""


class Encoder:
    """An exported encoder, ready to run on batches of pixels.

    Args:
        settings: artifact, device, type and threads.
    """

    def __init__(self, settings: ServeSettings) -> None:
        artifact = load_artifact(settings.artifact)
        self.preprocessing: Preprocessing = artifact.preprocessing
        self._device = torch.device("cuda" if settings.gpus else "cpu")
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
        self._encoder = artifact.encoder.eval().to(self._device, self._dtype)
        self.dimensions: int = artifact.encoder.width
        self.num_patches: int = artifact.encoder.num_patches

    @torch.inference_mode()
    def run(self, items: list[tuple[Pixels, Pooling]]) -> list[Floats]:
        """Encodes images of the model's size.

        Args:
            items: uint8 [H, W, C] pixels, each with its pooling.

        Returns:
            float32 [D] for `mean` (over patches, after the final LayerNorm), [N, D] for `patches`.
        """
        pixels_BHWC = torch.from_numpy(np.stack([pixels for pixels, _ in items]))
        images_BCHW = pixels_BHWC.to(self._device).permute(0, 3, 1, 2)
        prep = self.preprocessing
        normalized_BCHW = normalize(images_BCHW, prep.mean, prep.std).to(self._dtype)
        tokens_BND = self._encoder(normalized_BCHW).float()
        mean_BD = tokens_BND.mean(dim=1).cpu().numpy()
        return [
            mean_BD[index] if pooling == "mean" else tokens_BND[index].cpu().numpy()
            for index, (_, pooling) in enumerate(items)
        ]


class Embedder:
    """Serve deployment around an `Encoder`.

    The forward pass runs in one thread of its own, so that requests are received and health checks
    answered meanwhile. Only decoded pixels of the right shape get here: an image that cannot be
    decoded never joins a batch, and so cannot spoil one.

    Args:
        settings: see `ServeSettings`.
        telemetry: handle of the `Telemetry` deployment.
    """

    def __init__(self, settings: ServeSettings, telemetry: Any) -> None:
        threads = settings.threads or len(os.sched_getaffinity(0))
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self._encoder = Encoder(settings)
        self._card = ModelCard(
            name=settings.model or settings.artifact.rstrip("/").rpartition("/")[2],
            created=int(time.time()),
            dimensions=self._encoder.dimensions,
            num_patches=self._encoder.num_patches,
            preprocessing=self._encoder.preprocessing,
        )
        self._metrics(telemetry)
        self._warm_up(settings.batch_size)
        self._busy_since: float | None = None
        self._batcher = Batcher(
            self._run, batch_size=settings.batch_size, max_wait_s=settings.max_wait_ms / 1000
        )

    async def describe(self) -> ModelCard:
        """What is served here."""
        return self._card

    async def embed(self, pixels_BHWC: Pixels, pooling: Pooling) -> Floats:
        """Embeds the images of one request, together with those of others.

        Args:
            pixels_BHWC: uint8 [B, H, W, C], H = W = the model's image size.
            pooling: see `Encoder.run`.

        Returns:
            float32 [B, D] or [B, N, D], not normalised.
        """
        rows = [self._batcher.submit((pixels_HWC, pooling)) for pixels_HWC in pixels_BHWC]
        return np.stack(await asyncio.gather(*rows))

    def check_health(self) -> None:
        """Called by Serve every few seconds.

        Raises:
            RuntimeError: the forward pass hangs.
        """
        if self._busy_since is not None and time.monotonic() - self._busy_since > STUCK_AFTER_S:
            raise RuntimeError(f"a forward pass has been running for over {STUCK_AFTER_S:.0f} s")

    async def _run(self, items: list[tuple[Pixels, Pooling]]) -> list[Floats]:
        loop = asyncio.get_running_loop()
        self._busy_since = started = time.monotonic()
        try:
            return await loop.run_in_executor(self._thread, self._encoder.run, items)
        finally:
            self._busy_since = None
            self._batch_size.observe(len(items))
            self._forward_s.observe(time.monotonic() - started)
            self._images.inc(len(items))

    def _warm_up(self, batch_size: int) -> None:
        """Runs both ends of the batch sizes once, so that no request pays for first-time set-up."""
        size = self._card.preprocessing.image_size
        pixels = np.zeros((size, size, 3), np.uint8)
        for count in (batch_size, 1):
            self._thread.submit(self._encoder.run, [(pixels, "mean")] * count).result()

    def _metrics(self, telemetry: Any) -> None:
        registry = CollectorRegistry()
        self._batch_size = Histogram(
            "rayjepa_batch_size",
            "Images in a forward pass",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self._forward_s = Histogram(
            "rayjepa_forward_seconds",
            "Duration of a forward pass",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._images = Counter("rayjepa_images", "Images embedded", registry=registry)
        self._reporter = Reporter(registry, telemetry)
