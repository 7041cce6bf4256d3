"""From the body of a request to the body of its reply; knows nothing of HTTP or Ray.

Shape legend: B images of a request, H height, W width, C channels, N patches, D width.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pydantic_core

from serve.contract import Floats, ModelCard, Pixels, Pooling
from serve.fetching import ImageFetcher
from serve.inputs import Reference, decode_base64, parse_input, to_pixels
from serve.schemas import ApiError, EmbeddingRequest, parse_request, queue_full
from serve.settings import ServeSettings

EmbedFunction = Callable[[Pixels, Pooling], Awaitable[Floats]]

# Up to here a body is parsed, and a reply formatted, where it stands: a thread would cost more.
_PARSE_INLINE_BYTES = 262_144
_FORMAT_INLINE_VALUES = 32_768


class Admission:
    """Counts the images that are waiting or running, and refuses more than `limit`."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.images = 0

    def check(self, images: int) -> None:
        """Raises a 429 when that many more do not fit."""
        if self.images + images > self.limit:
            raise queue_full()

    @contextmanager
    def hold(self, images: int) -> Iterator[None]:
        """Holds places for as long as the images are in the system."""
        self.check(images)
        self.images += images
        try:
            yield
        finally:
            self.images -= images


class EmbeddingService:
    """Parses, decodes, embeds and formats.

    Args:
        settings: the limits.
        card: the model.
        embed: where pixels become embeddings (a Serve handle, or a plain function in tests).
    """

    def __init__(self, settings: ServeSettings, card: ModelCard, embed: EmbedFunction) -> None:
        self.card = card
        self.admission = Admission(settings.max_queued)
        self._settings = settings
        self._embed = embed
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._fetcher = ImageFetcher(
            settings.allow_hosts,
            max_bytes=settings.max_image_bytes,
            timeout_s=settings.fetch_timeout_s,
        )

    async def answer(self, body: bytes) -> bytes:
        """Serves one `POST /v1/embeddings`.

        Raises:
            ApiError: with the status and cause.
        """
        request = await self._parse(body)
        self._check(request)
        references = parse_input(request.input, max_items=self._settings.max_items)
        with self.admission.hold(len(references)):
            pixels_BHWC = await self._prepare(references)
            embeddings = await self._embed(pixels_BHWC, request.pooling)
        if embeddings.size <= _FORMAT_INLINE_VALUES:
            return self._reply(request, embeddings)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._reply, request, embeddings)

    async def close(self) -> None:
        """Releases threads and connections."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._fetcher.close()

    async def _parse(self, body: bytes) -> EmbeddingRequest:
        if len(body) <= _PARSE_INLINE_BYTES:
            return parse_request(body)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, parse_request, body)

    def _check(self, request: EmbeddingRequest) -> None:
        """The checks that need the model."""
        if request.model is not None:
            self.check_model(request.model)
        if request.modality not in (None, "image"):
            message = f"this model's modality is image, not {request.modality}"
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

    async def _prepare(self, references: list[Reference]) -> Pixels:
        """Decodes all images, or raises for the first one at fault, in request order."""
        # Collected rather than raised at once: no decode may outlive the request that holds its
        # place in the queue.
        found = await asyncio.gather(*map(self._load, references), return_exceptions=True)
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return np.stack([result for result in found if not isinstance(result, BaseException)])

    async def _load(self, reference: Reference) -> Pixels:
        loop = asyncio.get_running_loop()
        if not reference.is_url:
            return await loop.run_in_executor(self._threads, self._decode_inline, reference)
        data = await self._fetcher.fetch(reference)
        decode = partial(self._decode, data, reference)
        return await loop.run_in_executor(self._threads, decode)

    def _decode_inline(self, reference: Reference) -> Pixels:
        data = decode_base64(reference, max_bytes=self._settings.max_image_bytes)
        return self._decode(data, reference)

    def _decode(self, data: bytes, reference: Reference) -> Pixels:
        prep, max_pixels = self.card.preprocessing, self._settings.max_pixels
        return to_pixels(data, prep, max_pixels=max_pixels, param=reference.param)

    def _reply(self, request: EmbeddingRequest, embeddings: Floats) -> bytes:
        embeddings = shape_embeddings(embeddings, request)
        tokens = len(embeddings) * self.card.num_patches
        reply = {
            "object": "list",
            "data": [_entry(request, index, row) for index, row in enumerate(embeddings)],
            "model": self.card.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
        return pydantic_core.to_json(reply)


def shape_embeddings(embeddings: Floats, request: EmbeddingRequest) -> Floats:
    """Truncates to `dimensions`, then scales to unit length: in this order, as OpenAI does.

    Args:
        embeddings: float32 [..., D].
        request: says how.

    Returns:
        float32 [..., dimensions].
    """
    embeddings = embeddings[..., : request.dimensions]
    if not request.normalize:
        return embeddings
    norms = np.linalg.norm(embeddings, axis=-1, keepdims=True)
    unit: Floats = embeddings / np.maximum(norms, np.finfo(np.float32).tiny)
    return unit


def _entry(request: EmbeddingRequest, index: int, row: Floats) -> dict[str, Any]:
    value: str | list[Any]
    if request.encoding_format == "base64":
        value = base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
    else:
        value = row.tolist()
    entry: dict[str, Any] = {"object": "embedding", "index": index, "embedding": value}
    if request.pooling == "patches":
        entry["shape"] = list(row.shape)
    return entry
