"""Fetches and decodes the images and videos of a request to the pixels that the encoder takes.

Shape legend: T frames, H height, W width, C channels.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from models.media.preprocessing import EncoderInput, Preprocessing
from serve.embeddings.contract import Decoded, ModelCard, Pixels
from serve.embeddings.media.decode_pool import DecodePool, SampledVideo
from serve.embeddings.media.fetching import ImageFetcher
from serve.embeddings.media.inputs import Reference, Sampling, decode_base64, to_input
from serve.embeddings.settings import ServeSettings
from serve.ingress.errors import ApiError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Item:
    """One image or video, decoded.

    Attributes:
        parts: images or clips, all with the same patches.
        size: height and width of the picture before it was fitted, pixels.
        times_s: times of a video's sampled frames; None for an image.
    """

    parts: list[EncoderInput]
    size: tuple[int, int]
    times_s: list[float] | None = None


class MediaLoader:
    """Fetches items, and decodes images in threads and videos in processes.

    Args:
        settings: the limits.
        threads: threads that decode images.
    """

    def __init__(self, settings: ServeSettings, threads: ThreadPoolExecutor) -> None:
        self._settings, self._threads = settings, threads
        self.fetcher = ImageFetcher(
            settings.allow_hosts,
            max_bytes=settings.max_image_bytes,
            max_video_bytes=settings.max_video_bytes,
            timeout_s=settings.fetch_timeout_s,
        )
        self.decoders = DecodePool(
            processes=max(settings.decode_processes, 1),
            memory_mib=settings.decode_memory_mib,
            timeout_s=settings.decode_timeout_s,
        )

    async def load(self, reference: Reference, card: ModelCard, prep: Preprocessing) -> Item:
        """Returns one item, fitted to a model.

        Args:
            reference: the item.
            card: the model.
            prep: its transform, with the regions that are left out.

        Raises:
            ApiError: the item cannot be fetched or decoded.
        """
        if reference.sampling is None:
            image = await self._image(reference, prep)
            return Item([image.input], image.size)
        job = self._job(reference.sampling, card)
        sampled = await self._video(reference, job, prep)
        frames, kept = sampled.frames, sampled.frames.input.kept
        clips = to_parts(frames.input.pixels, card)
        return Item([EncoderInput(clip, kept) for clip in clips], frames.size, sampled.times_s)

    async def decode_image(self, data: bytes, prep: Preprocessing, param: str) -> Decoded:
        """Decodes and transforms one image in a thread; raises as `to_input`."""
        return await self._in_thread(self._decode, data, prep, param)

    async def close(self) -> None:
        """Releases connections and processes."""
        await self.fetcher.close()
        await self.decoders.close()

    async def _image(self, reference: Reference, prep: Preprocessing) -> Decoded:
        if not reference.is_url:
            return await self._in_thread(self._decode_inline, reference, prep)
        return await self.decode_image(await self.fetcher.fetch(reference), prep, reference.param)

    async def _video(
        self, reference: Reference, job: dict[str, Any], prep: Preprocessing
    ) -> SampledVideo:
        if not self._settings.decode_processes:
            message = "this server takes no videos (decode_processes is 0)"
            raise ApiError(400, "unsupported_modality", message, param=reference.param)
        if reference.is_url:
            data = await self.fetcher.fetch(reference)
        else:
            most = self._settings.max_video_bytes
            data = await self._in_thread(partial(decode_base64, max_bytes=most), reference)
        job = job | {"one_size": prep.partial}
        return await self.decoders.sample(data, job, prep, param=reference.param)

    def _job(self, sampling: Sampling, card: ModelCard) -> dict[str, Any]:
        """Fields of `serve.embeddings.media.sample_video.ClipRequest`."""
        settings, frames = self._settings, card.frames
        frames = frames if frames > 1 else settings.video_frames
        return dataclasses.asdict(sampling) | {
            "frames": frames,
            "max_frames": max(settings.max_video_frames, frames),
            "max_source_frames": settings.max_source_frames,
            "max_pixels": settings.max_video_pixels,
            "max_s": settings.max_video_s,
        }

    async def _in_thread(self, call: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *args)

    def _decode_inline(self, reference: Reference, prep: Preprocessing) -> Decoded:
        data = decode_base64(reference, max_bytes=self._settings.max_image_bytes)
        return self._decode(data, prep, reference.param)

    def _decode(self, data: bytes, prep: Preprocessing, param: str) -> Decoded:
        return to_input(data, prep, max_pixels=self._settings.max_pixels, param=param)


def to_parts(pixels_THWC: Pixels, card: ModelCard) -> list[Pixels]:
    """Divides the frames of a video into inputs of the encoder, in order.

    An image encoder gets every frame separately. A video encoder gets clips of its length; the last
    clip may be shorter, with its last frame repeated up to a whole time step.
    """
    if card.frames == 1:
        return list(pixels_THWC)
    parts = []
    for first in range(0, len(pixels_THWC), card.frames):
        part = pixels_THWC[first : first + card.frames]
        missing = -len(part) % card.tubelet
        parts.append(np.concatenate([part, part[-1:].repeat(missing, axis=0)]) if missing else part)
    return parts
