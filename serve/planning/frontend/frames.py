"""Reads the frames of a request, by the same door as the embeddings' images."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from models.image_size import height_width
from models.media.preprocessing import Preprocessing
from serve.embeddings.media.inputs import Reference, decode_base64, parse_image, to_input
from serve.ingress.errors import ApiError
from serve.planning.contract import Pixels
from serve.planning.settings import PlanningSettings


class FrameReader:
    """Decodes frames in threads.

    Args:
        settings: the limits.
        threads: threads that decode.
    """

    def __init__(self, settings: PlanningSettings, threads: ThreadPoolExecutor) -> None:
        self._settings, self._threads = settings, threads

    async def read(self, value: Any, param: str, prep: Preprocessing) -> Pixels:
        """Returns one frame, uint8 [H, W, 3] of the model's size.

        Args:
            value: an image as `/v1/embeddings` takes it, without URLs; or an object with `raw`.
            param: the frame's path in the request, for errors.
            prep: how a picture is fitted to the model.

        Raises:
            ApiError: the frame is malformed, too large or cannot be decoded.
        """
        is_raw = isinstance(value, dict) and value.get("raw") is not None
        reference = _raw_reference(value, param) if is_raw else parse_image(value, param)
        if reference.is_url:
            message = "frames are sent with the request; this server fetches nothing"
            raise ApiError(400, "url_not_allowed", message, param=reference.param)
        loop, call = asyncio.get_running_loop(), self._raw if is_raw else self._decoded
        return await loop.run_in_executor(self._threads, call, reference, prep)

    async def read_all(self, values: list[tuple[Any, str]], prep: Preprocessing) -> list[Pixels]:
        """Reads several (value, param); raises for the first one at fault."""
        reads = (self.read(value, param, prep) for value, param in values)
        found = await asyncio.gather(*reads, return_exceptions=True)
        for result in found:
            if isinstance(result, BaseException):
                raise result
        return [result for result in found if not isinstance(result, BaseException)]

    def _decoded(self, reference: Reference, prep: Preprocessing) -> Pixels:
        data = decode_base64(reference, max_bytes=self._settings.max_image_bytes)
        most, param = self._settings.max_pixels, reference.param
        return to_input(data, prep, max_pixels=most, param=param).input.pixels

    def _raw(self, reference: Reference, prep: Preprocessing) -> Pixels:
        data = decode_base64(reference, max_bytes=self._settings.max_image_bytes)
        height, width = height_width(prep.image_size)
        if len(data) != height * width * 3:
            message = (
                f"raw holds {len(data)} bytes; a frame of {width} x {height} RGB pixels has "
                f"{height * width * 3}"
            )
            raise ApiError(400, "invalid_value", message, param=reference.param)
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def _raw_reference(value: dict[str, Any], param: str) -> Reference:
    stray = sorted(set(value) - {"raw"})
    if stray:
        message = f"unknown keys {stray} beside raw"
        raise ApiError(400, "unknown_field", message, param=f"{param}.{stray[0]}")
    if not isinstance(value["raw"], str):
        message = "raw must be a string of base64"
        raise ApiError(400, "invalid_type", message, param=f"{param}.raw")
    return Reference(f"{param}.raw", value["raw"], is_url=False)
