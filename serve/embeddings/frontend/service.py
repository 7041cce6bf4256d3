"""Turns the body of a request into the body of its reply, without HTTP or Ray.

Shape legend: B images or clips of a request, D width. A part is one image or clip; see
`serve/embeddings/media/loader.py`.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter

from models.media.preprocessing import EncoderInput, Preprocessing
from serve.embeddings.contract import EmbedFunction, Floats, ModelCard, Pooling
from serve.embeddings.encoding import encode
from serve.embeddings.frontend.schemas import EmbeddingRequest, parse_request
from serve.embeddings.media.fitting import aspect_warning
from serve.embeddings.media.inputs import Kind, Reference, parse_input
from serve.embeddings.media.loader import Item, MediaLoader
from serve.embeddings.settings import ServeSettings
from serve.ingress.errors import ApiError, queue_full
from serve.ingress.json_text import to_json

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
        card: the model.
        embed: embeds pixels, through a Serve handle or, in tests, directly.
        registry: takes the metrics; None for a service that nobody watches.
    """

    def __init__(
        self,
        settings: ServeSettings,
        card: ModelCard,
        embed: EmbedFunction,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.card = card
        self.admission = Admission(settings.max_queued, settings.max_queued_videos)
        self.settings = settings
        self._embed = embed
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self.media = MediaLoader(settings, card, self._threads)
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
        self._check(request)
        default: Kind = "video" if request.modality == "video" else "image"
        most = self.settings.max_items
        references = parse_input(request.input, max_items=most, default=default)
        videos = self._count_videos(references)
        with self.admission.hold(len(references) - videos, videos):
            items = await self._prepare(references, self.card.transform(request.regions))
            embeddings = await embed_items(items, request.pooling, self._embed)
        if sum(values.size for values in embeddings) <= _FORMAT_INLINE_VALUES:
            return self._reply(request, items, embeddings)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._reply, request, items, embeddings)

    async def close(self) -> None:
        """Releases threads and connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self.media.close()

    async def _parse(self, body: bytes) -> EmbeddingRequest:
        if len(body) <= _PARSE_INLINE_BYTES:
            return parse_request(body)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, parse_request, body)

    def _check(self, request: EmbeddingRequest) -> None:
        """Raises what is wrong with a request, given the model."""
        if request.model is not None:
            self.check_model(request.model)
        if request.modality not in (None, "image", "video"):
            message = f"modality must be image or video, not {request.modality}"
            raise ApiError(400, "unsupported_modality", message, param="modality")
        dimensions, width = request.dimensions, self.card.dimensions
        if dimensions is not None and not 1 <= dimensions <= width:
            message = f"dimensions must lie between 1 and {width}, got {dimensions}"
            raise ApiError(400, "invalid_value", message, param="dimensions")

    def check_model(self, name: str) -> None:
        """Raises a 404 for any name but the served model's."""
        if name != self.card.name:
            message = f"the model {name!r} does not exist; this server has {self.card.name!r}"
            raise ApiError(404, "model_not_found", message, param="model")

    def _count_videos(self, references: list[Reference]) -> int:
        videos = sum(reference.kind == "video" for reference in references)
        most = self.settings.max_queued_videos
        if videos > most:
            message = f"input holds {videos} videos; at most {most} are allowed"
            raise ApiError(400, "too_many_items", message, param="input")
        return videos

    async def _prepare(self, references: list[Reference], prep: Preprocessing) -> list[Item]:
        """Decodes all items; raises for the first one at fault, in the request's order."""
        # Exceptions are collected and not raised at once, so that no decoding goes on after the
        # request has given back its place.
        loads = (self.media.load(reference, prep) for reference in references)
        found = await asyncio.gather(*loads, return_exceptions=True)
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return [result for result in found if not isinstance(result, BaseException)]

    def _reply(
        self, request: EmbeddingRequest, items: list[Item], embeddings: list[Floats]
    ) -> bytes:
        tokens = sum(count_tokens(part, self.card) for item in items for part in item.parts)
        rows = zip(items, embeddings, strict=True)
        reply = {
            "object": "list",
            "data": [self._entry(request, index, *row) for index, row in enumerate(rows)],
            "model": self.card.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        warnings = self._warnings(items)
        return to_json(reply | {"warnings": warnings} if warnings else reply)

    def _entry(
        self, request: EmbeddingRequest, index: int, item: Item, row: Floats
    ) -> dict[str, Any]:
        fields = encode(row, request, item.parts[0].kept, self.card.grid)
        entry = {"object": "embedding", "index": index, **fields}
        if item.times_s is not None:
            entry["times_s"] = item.times_s
        return entry

    def _warnings(self, items: list[Item]) -> list[dict[str, Any]]:
        """Returns what `schemas.Notice` describes, once for all pictures of one size."""
        told: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            message = aspect_warning(item.size, self.card.preprocessing)
            if message is not None:
                self._aspects_differ.inc()
                told.setdefault(message, []).append(index)
        return [
            {"code": "aspects_differ", "message": message, "items": indices}
            for message, indices in told.items()
        ]


def count_tokens(part: EncoderInput, card: ModelCard) -> int:
    """Returns the tokens of an image or clip that are encoded."""
    steps = len(part.pixels) // card.tubelet if part.pixels.ndim == 4 else 1
    return steps * (card.num_patches if part.kept is None else int(part.kept.sum()))


async def embed_items(items: list[Item], pooling: Pooling, embed: EmbedFunction) -> list[Floats]:
    """Embeds the parts of all items in one call, and pools them for each item.

    Returns:
        One float32 array for each item: [D] for `mean`, [steps, D] for `per_frame`, [tokens, D] for
        `patches`.
    """
    rows = iter(await embed([part for item in items for part in item.parts], pooling))
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
