"""The embedder's replica: turns pixels into embeddings in dynamic batches.

Shape legend: B images or clips of a batch, T frames, H height, W width, C channels, N tokens (time
first) that are encoded, S time steps, D width.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry, Counter, Histogram

from models.artifacts.alignment import StoredAlignment, load_alignment
from models.artifacts.artifact import Artifact, load_artifact
from models.beliefs.expectation import Surprise
from models.beliefs.stored import load_surprise
from models.encoders.blocks import use_plain_attention
from models.encoders.input_batch import Encoded, InputBatch, encode
from models.encoders.linear import pack_linear
from models.image_size import height_width
from models.media.preprocessing import EncoderInput, Preprocessing, normalize
from serve.embeddings.contract import Floats, ModelCard, Pooling
from serve.embeddings.settings import ServeSettings
from serve.replicas.batch_threads import BatchThreads
from serve.replicas.batching import Batcher
from serve.replicas.calls import Refusal
from serve.replicas.served_model import check_deployed
from serve.telemetry import BATCH_BUCKETS, LATENCY_BUCKETS_S, Reporter

STUCK_AFTER_S = 300.0
"""Seconds of one forward pass after which the health check fails and Serve restarts the replica."""
MOST_PLAIN_TOKENS = 512
"""Tokens of a sequence up to which attention by plain products takes little memory: 17 MB a head of
a batch of 32."""


def read_card(settings: ServeSettings) -> ModelCard:
    """Reads from the artifact what the application serves.

    Raises as `load_artifact` and, where features are aligned, as `load_alignment`.
    """
    artifact = load_artifact(settings.artifact)
    surprise = load_surprise(settings.artifact, artifact.encoder)
    return _card_of(settings, artifact, _alignment(settings, artifact), surprise)


def _card_of(
    settings: ServeSettings,
    artifact: Artifact,
    stored: StoredAlignment | None,
    surprise: Surprise | None,
) -> ModelCard:
    encoder = artifact.encoder
    card = ModelCard(
        name=settings.model or settings.artifact.rstrip("/").rpartition("/")[2],
        dimensions=encoder.width,
        num_patches=encoder.grid.per_step,
        grid=(encoder.grid.rows, encoder.grid.columns),
        preprocessing=artifact.preprocessing,
        frames=encoder.frames,
        tubelet=encoder.tubelet,
        alignment=None if stored is None else stored.origin.how,
        surprise=surprise is not None,
    )
    aligned = None if stored is None else stored.alignment.hash
    told = (artifact.fingerprint, settings.dtype, card, aligned)
    return dataclasses.replace(card, fingerprint=hashlib.sha256(repr(told).encode()).hexdigest())


class Encoder:
    """An exported encoder that runs on batches of pixels.

    Args:
        settings: the artifact, its alignment, device and dtype.
    """

    def __init__(self, settings: ServeSettings) -> None:
        artifact = load_artifact(settings.artifact)
        stored = _alignment(settings, artifact)
        surprise = load_surprise(settings.artifact, artifact.encoder)
        self.card = _card_of(settings, artifact, stored, surprise)
        self.preprocessing: Preprocessing = artifact.preprocessing
        self._align = None if stored is None else stored.alignment
        self._device = torch.device("cuda" if settings.gpus else "cpu")
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
        self._encoder = artifact.encoder.eval().to(self._device, self._dtype)
        self._surprise = None if surprise is None else surprise.to(self._device, self._dtype)
        pack_linear(self._encoder)
        if not settings.gpus and settings.dtype == "bf16":
            self._use_plain_attention()

    def _use_plain_attention(self) -> None:
        """Takes the faster attention of bfloat16 on CPUs, where its weights do not fill memory."""
        if self.card.num_patches * self.card.frames // self.card.tubelet > MOST_PLAIN_TOKENS:
            return
        use_plain_attention(self._encoder)
        if self._surprise is not None:
            use_plain_attention(self._surprise)

    @torch.inference_mode()
    def run(self, items: list[tuple[EncoderInput, Pooling]]) -> list[Floats]:
        """Encodes images and clips, those of the same number of frames in one forward pass.

        Args:
            items: images [H, W, C] or clips [T, H, W, C], each with its pooling.

        Returns:
            float32, after the final LayerNorm and the alignment if there is one: [D] for `mean`
            (over all tokens), [S, D] for `per_frame` (over those of a time step), [N, D] for
            `patches`; for `surprise` see `surprise`.
        """
        asked = [index for index, (_, pooling) in enumerate(items) if pooling == "surprise"]
        results = dict(zip(asked, self.surprise([items[i][0] for i in asked]), strict=True))
        alike: dict[int, list[int]] = {}
        for index, (one, pooling) in enumerate(items):
            if pooling != "surprise":
                frames = len(one.pixels) if one.pixels.ndim == 4 else 0
                alike.setdefault(frames, []).append(index)
        for indices in alike.values():
            batch = InputBatch.of([items[index][0] for index in indices], self.preprocessing)
            encoded = encode(self._encoder, batch, self.preprocessing)
            pooled = self._pool(encoded, [items[index][1] for index in indices])
            if self._align is not None:
                pooled = [self._align(features) for features in pooled]
            results.update(zip(indices, pooled, strict=True))
        return [results[index] for index in range(len(items))]

    @torch.inference_mode()
    def surprise(self, inputs: list[EncoderInput]) -> list[Floats]:
        """Returns how wrong the predictor is, as a multiple of how wrong it usually is.

        A clip that is shorter than the encoder's is continued with its last frame, and only its own
        time steps are answered.

        Args:
            inputs: images [H, W, C] or clips [T, H, W, C].

        Returns:
            float32 [S, 1 + patches] of each: the whole time step's, then every patch's.
        """
        if not inputs:
            return []
        assert self._surprise is not None, "the ingress refuses what the model cannot answer"
        frames, tubelet = self.card.frames, self.card.tubelet
        clips = [one.pixels if one.pixels.ndim == 4 else one.pixels[None] for one in inputs]
        whole = [np.concatenate([c, c[-1:].repeat(frames - len(c), axis=0)]) for c in clips]
        pixels = torch.from_numpy(np.stack(whole)).to(self._device).movedim(-1, 1)
        pixels = pixels[:, :, 0] if frames == 1 else pixels
        normalised = normalize(pixels, self.preprocessing.mean, self.preprocessing.std)
        patches = self._surprise.expectation.patches(normalised.to(self._dtype))
        errors_BN = self._surprise.errors(patches)
        maps = self._surprise.map(errors_BN).reshape(len(inputs), -1, self.card.num_patches)
        told = torch.cat([self._surprise.by_step(errors_BN)[..., None], maps], dim=-1)
        steps = [-(-len(clip) // tubelet) for clip in clips]
        return [one[:count] for one, count in zip(told.float().cpu().numpy(), steps, strict=True)]

    def _pool(self, encoded: Encoded, poolings: list[Pooling]) -> list[Floats]:
        """Pools; the host waits for the device once for all means, and once for tokens if any are
        asked for."""
        steps, D = encoded.count // self.card.num_patches, self.card.dimensions
        pooled: list[Floats] = list(encoded.mean().cpu().numpy())
        rows = [row for row, pooling in enumerate(poolings) if pooling != "mean"]
        if not rows:
            return pooled
        for row, tokens_ND in zip(rows, encoded.on_host(rows).each(), strict=True):
            if poolings[row] == "per_frame":  # every time step has the same patches
                tokens_ND = tokens_ND.reshape(steps, -1, D).mean(dim=1)
            pooled[row] = tokens_ND.numpy()
        return pooled


def _alignment(settings: ServeSettings, artifact: Artifact) -> StoredAlignment | None:
    """Reads the alignment; raises a ValueError if it is not for the artifact's features."""
    if settings.align is None:
        return None
    stored = load_alignment(settings.align)
    stored.check(artifact.encoder, artifact.preprocessing)
    return stored


class Embedder:
    """Serve deployment around an `Encoder`.

    Forward passes run in threads of their own, so that requests and health checks are answered
    meanwhile (see `BatchThreads`). Requests hold decoded pixels of the right shape: an image that
    cannot be decoded fails in the ingress, and no batch fails because of it.

    Args:
        settings: see `ServeSettings`.
        telemetry: handle of the `Telemetry` deployment.
        card: what the artifact was when the application was built.

    Raises:
        ValueError: the artifact has changed since then.
    """

    def __init__(self, settings: ServeSettings, telemetry: Any, card: ModelCard) -> None:
        self._threads = BatchThreads(settings)  # before anything is computed
        self._encoder = Encoder(settings)
        self._card = self._encoder.card
        check_deployed(self._card, card, f"artifact={settings.artifact}")
        self._metrics(telemetry)
        self._warm_up(settings.batch_size)
        self._batcher = Batcher(
            self._run,
            batch_size=settings.batch_size,
            max_wait_s=settings.max_wait_ms / 1000,
            max_concurrent_batches=self._threads.max_concurrent_batches,
        )

    async def describe(self) -> ModelCard:
        """Returns what this replica serves."""
        return self._card

    async def embed(
        self, inputs: Sequence[EncoderInput], pooling: Pooling, fingerprint: str
    ) -> list[Floats] | Refusal[ModelCard]:
        """Embeds the images or clips of one request, in batches with those of other requests.

        Args:
            inputs: images, or clips whose frames are a multiple of the tubelet up to the clip's
                frames, as the artifact's transform makes them.
            pooling: see `Encoder.run`.
            fingerprint: of the model that the inputs were prepared for.

        Returns:
            float32 [D], [S, D] or [N, D] of each, not normalised; a refusal if this replica serves
            another model.
        """
        if fingerprint != self._card.fingerprint:
            return Refusal(self._card)
        return list(await asyncio.gather(*(self._batcher.submit((i, pooling)) for i in inputs)))

    def check_health(self) -> None:
        """Called by Serve every few seconds.

        Raises:
            RuntimeError: a forward pass takes too long.
        """
        if self._threads.longest_s() > STUCK_AFTER_S:
            raise RuntimeError(f"a forward pass has been running for over {STUCK_AFTER_S:.0f} s")

    async def _run(self, items: list[tuple[EncoderInput, Pooling]]) -> list[Floats]:
        started = time.monotonic()
        try:
            return await self._threads.run(
                partial(self._encoder.run, items), is_single=len(items) == 1
            )
        finally:
            self._batch_size.observe(len(items))
            self._forward_s.observe(time.monotonic() - started)
            self._images.inc(len(items))

    def _warm_up(self, batch_size: int) -> None:
        """Runs the largest and the smallest batch, so that no request waits for first-time set-up.

        For clips it runs only one clip, because a full batch may take minutes on CPUs.
        """
        size, frames = height_width(self._card.preprocessing.image_size), self._card.frames
        image = EncoderInput(np.zeros((*size, 3), np.uint8))
        most = max(1, batch_size // self._threads.max_concurrent_batches)
        one, full = (partial(self._encoder.run, [(image, "mean")] * count) for count in (1, most))
        if frames > 1:
            clip = EncoderInput(np.zeros((frames, *size, 3), np.uint8))
            one = partial(self._encoder.run, [(image, "mean"), (clip, "mean")])
        self._threads.warm_up(one, full)

    def _metrics(self, telemetry: Any) -> None:
        registry = CollectorRegistry()
        self._batch_size = Histogram(
            "rayjepa_batch_size",
            "Images and clips in a forward pass",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self._forward_s = Histogram(
            "rayjepa_forward_seconds",
            "Duration of a forward pass",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._images = Counter("rayjepa_images", "Images and clips embedded", registry=registry)
        self._reporter = Reporter(registry, telemetry)
