"""Turns the body of a request into the body of its reply, without HTTP or Ray.

Shape legend: B images or clips of a request, D width. A part is one image or clip; see
`serve/embeddings/media/loader.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter

from models.media.preprocessing import EncoderInput, Preprocessing
from serve.embeddings.contract import EmbedFunction, Floats, ModelCard, Pooling
from serve.embeddings.encoding import check_output, encode
from serve.embeddings.frontend.schemas import EmbeddingRequest, parse_request
from serve.embeddings.media.fitting import aspect_warning
from serve.embeddings.media.inputs import Kind, Reference, parse_input
from serve.embeddings.media.loader import Item, MediaLoader
from serve.embeddings.settings import ServeSettings
from serve.ingress.errors import ApiError, queue_full
from serve.ingress.json_text import to_json
from serve.replicas.calls import OtherModel
from serve.replicas.served_model import ServedModel

# Up to these sizes a body is parsed and a reply formatted in the event loop: passing it to a thread
# would cost more.
_PARSE_INLINE_BYTES = 262_144
_FORMAT_INLINE_VALUES = 32_768


class Admission:
    """Counts images and videos that wait or are in progress, and refuses more than allowed."""

    def __init__(self, limit: int, video_limit: int = 0) -> None:
        self.limit, self.video_limit = limit, video_limit
        self.images = self.videos = 0

    def check(self, images: int, videos: int = 0) -> None:
        """Raises a 429 if so many more would exceed a limit."""
        too_many_videos = videos and self.videos + videos > self.video_limit
        if self.images + images > self.limit or too_many_videos:
            raise queue_full()

    @contextmanager
    def hold(self, images: int, videos: int = 0) -> Iterator[None]:
        """Counts images and videos while the block runs; raises as `check`."""
        self.check(images, videos)
        self.images += images
        self.videos += videos
        try:
            yield
        finally:
            self.images -= images
            self.videos -= videos


class EmbeddingService:
    """Answers embedding requests.

    Args:
        settings: the limits.
        model: the model that requests are prepared for.
        embed: embeds pixels, through a Serve handle or, in tests, directly.
        registry: takes the metrics; None for a service that nobody watches.
    """

    def __init__(
        self,
        settings: ServeSettings,
        model: ServedModel[ModelCard],
        embed: EmbedFunction,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.model, self.created = model, int(time.time())
        self.admission = Admission(settings.max_queued, settings.max_queued_videos)
        self.settings = settings
        self._embed = embed
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self.media = MediaLoader(settings, self._threads)
        self._aspects_differ = Counter(
            "rayjepa_aspects_differ",
            "Images and videos whose aspect differs from the model's by more than 5%",
            registry=registry,
        )

    async def answer(self, body: bytes) -> bytes:
        """Returns the reply's body for the body of one `POST /v1/embeddings`.

        Raises:
            ApiError: with status and cause.
        """
        request = await self._parse(body)
        _check(request, self.model.named(request.model))
        default: Kind = "video" if request.modality == "video" else "image"
        most = self.settings.max_items
        references = parse_input(request.input, max_items=most, default=default)
        videos = self._count_videos(references)
        with self.admission.hold(len(references) - videos, videos):
            card, items, embeddings = await self._by_one_model(request, references)
        if sum(values.size for values in embeddings) <= _FORMAT_INLINE_VALUES:
            return self._reply(request, card, items, embeddings)
        reply = partial(self._reply, request, card, items, embeddings)
        return await asyncio.get_running_loop().run_in_executor(self._threads, reply)

    async def close(self) -> None:
        """Releases threads and connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self.media.close()

    async def _parse(self, body: bytes) -> EmbeddingRequest:
        if len(body) <= _PARSE_INLINE_BYTES:
            return parse_request(body)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, parse_request, body)

    async def _by_one_model(
        self, request: EmbeddingRequest, references: list[Reference]
    ) -> tuple[ModelCard, list[Item], list[Floats]]:
        """Decodes and embeds all items for one model, and again if its replicas have gone.

        Returns:
            The model, and each item with its embedding.
        """
        card = self.model.named(request.model)
        while True:
            _check(request, card)
            items = await self._prepare(references, card, card.transform(request.regions))
            try:
                embeddings = await embed_items(items, request.pooling, card, self._embed)
            except OtherModel as other:
                card = await self.model.instead(request.model, other.card)
                continue
            self.model.answered(card)
            return card, items, embeddings

    def _count_videos(self, references: list[Reference]) -> int:
        videos = sum(reference.kind == "video" for reference in references)
        most = self.settings.max_queued_videos
        if videos > most:
            message = f"input holds {videos} videos; at most {most} are allowed"
            raise ApiError(400, "too_many_items", message, param="input")
        return videos

    async def _prepare(
        self, references: list[Reference], card: ModelCard, prep: Preprocessing
    ) -> list[Item]:
        """Decodes all items; raises for the first one at fault, in the request's order."""
        # Exceptions are collected and not raised at once, so that no decoding goes on after the
        # request has given back its place.
        loads = (self.media.load(reference, card, prep) for reference in references)
        found = await asyncio.gather(*loads, return_exceptions=True)
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return [result for result in found if not isinstance(result, BaseException)]

    def _reply(
        self,
        request: EmbeddingRequest,
        card: ModelCard,
        items: list[Item],
        embeddings: list[Floats],
    ) -> bytes:
        tokens = sum(count_tokens(part, card) for item in items for part in item.parts)
        rows = zip(items, embeddings, strict=True)
        reply = {
            "object": "list",
            "data": [_entry(request, card.grid, index, *row) for index, row in enumerate(rows)],
            "model": card.name,
            "fingerprint": card.fingerprint,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        warnings = self._warnings(card, items)
        return to_json(reply | {"warnings": warnings} if warnings else reply)

    def _warnings(self, card: ModelCard, items: list[Item]) -> list[dict[str, Any]]:
        """Returns what `schemas.Notice` describes, once for all pictures of one size."""
        told: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            message = aspect_warning(item.size, card.preprocessing)
            if message is not None:
                self._aspects_differ.inc()
                told.setdefault(message, []).append(index)
        return [
            {"code": "aspects_differ", "message": message, "items": indices}
            for message, indices in told.items()
        ]


def _check(request: EmbeddingRequest, card: ModelCard) -> None:
    """Raises what is wrong with a request, given the model."""
    if request.modality not in (None, "image", "video"):
        message = f"modality must be image or video, not {request.modality}"
        raise ApiError(400, "unsupported_modality", message, param="modality")
    check_output(request, request.regions, card)


def _entry(
    request: EmbeddingRequest, grid: tuple[int, int], index: int, item: Item, row: Floats
) -> dict[str, Any]:
    fields = encode(row, request, item.parts[0].kept, grid)
    entry = {"object": "embedding", "index": index, **fields}
    if item.times_s is not None:
        entry["times_s"] = item.times_s
    return entry


def count_tokens(part: EncoderInput, card: ModelCard) -> int:
    """Returns the tokens of an image or clip that are encoded."""
    steps = len(part.pixels) // card.tubelet if part.pixels.ndim == 4 else 1
    return steps * (card.num_patches if part.kept is None else int(part.kept.sum()))


async def embed_items(
    items: list[Item], pooling: Pooling, card: ModelCard, embed: EmbedFunction
) -> list[Floats]:
    """Embeds the parts of all items in one call, and pools them for each item.

    Returns:
        One float32 array for each item: [D] for `mean`, [steps, D] for `per_frame`, [tokens, D] for
        `patches`, [steps, 1 + patches] for `surprise`.
    """
    rows = iter(await embed([part for item in items for part in item.parts], pooling, card))
    return [
        _pool_parts(item.parts, list(itertools.islice(rows, len(item.parts))), pooling)
        for item in items
    ]


def _pool_parts(parts: list[EncoderInput], rows: list[Floats], pooling: Pooling) -> Floats:
    if len(rows) == 1:
        return rows[0]
    if pooling != "mean":
        return np.concatenate(rows)
    # Weighted by length, which gives the mean over all tokens as if the parts were one.
    lengths = [len(part.pixels) if part.pixels.ndim == 4 else 1 for part in parts]
    mean: Floats = np.average(np.stack(rows), axis=0, weights=lengths).astype(np.float32)
    return mean
