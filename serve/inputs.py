"""The shapes of `input` that image-embedding clients send, and images out of them.

OpenAI strings and lists, infinity's and Jina's objects, and OpenAI's content parts come down to a
list of references (text that is a URL or encodes bytes), each with the path that error messages
name it by.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.images import ImageError, decode_image
from models.preprocessing import Preprocessing, eval_transform
from serve.schemas import ApiError

_DATA_URI = re.compile(r"data:([^;,]*)((?:;[^;,]+)*?)(;base64)?,", re.IGNORECASE)
_MEDIA_TYPE = re.compile(r"(image/[a-z0-9.+-]+|application/octet-stream)?", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_FOREIGN = ("text", "video", "audio", "input_audio", "video_url", "audio_url")


@dataclass(frozen=True)
class Reference:
    """One image as the client named it.

    Attributes:
        param: path of the item in the request, for error messages.
        text: a URL, or base64 with or without a data URI's head.
        is_url: which of the two.
    """

    param: str
    text: str
    is_url: bool


def parse_input(value: Any, *, max_items: int) -> list[Reference]:
    """Turns `input` into references, in order.

    Raises:
        ApiError: 400, naming the first item at fault.
    """
    if not isinstance(value, list):
        return [_reference(value, "input")]
    if not value:
        raise ApiError(400, "empty_input", "input must hold at least one image", param="input")
    if len(value) > max_items:
        message = f"input holds {len(value)} items; at most {max_items} are allowed"
        raise ApiError(400, "too_many_items", message, param="input")
    return [_reference(item, f"input[{index}]") for index, item in enumerate(value)]


def _reference(item: Any, param: str) -> Reference:
    if isinstance(item, str):
        is_url = _URL.match(item) is not None
        return Reference(param, item, is_url)
    if isinstance(item, dict):
        return _object_reference(item, param)
    if isinstance(item, int | list) and not isinstance(item, bool):
        raise _wrong_modality("token ids", param)
    kind = type(item).__name__
    raise ApiError(
        400, "invalid_type", f"an image is a string or an object, not {kind}", param=param
    )


def _object_reference(item: dict[str, Any], param: str) -> Reference:
    for foreign in _FOREIGN:
        if foreign in item or item.get("type") == foreign:
            raise _wrong_modality(foreign, param)
    if "content" in item:
        return _content_reference(item, param)
    if "image_url" in item:
        _only_keys(item, {"type", "image_url"}, param)
        return _image_url_reference(item, param)
    keys = [key for key in ("image", "url", "bytes") if key in item]
    if len(keys) != 1:
        message = "an image object has one of the keys image, url, bytes, image_url, content"
        raise ApiError(400, "invalid_object", message, param=param)
    key = keys[0]
    _only_keys(item, {key}, param)
    text = _text(item[key], f"{param}.{key}")
    is_url = key == "url" or (key == "image" and _URL.match(text) is not None)
    # A data URI under "url" is inline data all the same.
    return Reference(f"{param}.{key}", text, is_url and not text.startswith("data:"))


def _content_reference(item: dict[str, Any], param: str) -> Reference:
    _only_keys(item, {"content", "role"}, param)
    parts = item["content"]
    if not isinstance(parts, list) or len(parts) != 1 or not isinstance(parts[0], dict):
        message = "content must be a list of exactly one image_url part (one vector an item)"
        raise ApiError(400, "invalid_content", message, param=f"{param}.content")
    if "content" in parts[0]:
        raise ApiError(400, "invalid_content", "content does not nest", param=f"{param}.content[0]")
    return _object_reference(parts[0], f"{param}.content[0]")


def _image_url_reference(part: dict[str, Any], param: str) -> Reference:
    if part.get("type", "image_url") != "image_url":
        message = f"a part with image_url has type image_url, not {part['type']!r}"
        raise ApiError(400, "invalid_content", message, param=f"{param}.type")
    target = part["image_url"]
    if isinstance(target, dict):
        _only_keys(target, {"url", "detail"}, f"{param}.image_url")
        target = target.get("url")
    text = _text(target, f"{param}.image_url.url")
    return Reference(f"{param}.image_url.url", text, _URL.match(text) is not None)


def _only_keys(item: dict[str, Any], allowed: set[str], param: str) -> None:
    stray = sorted(set(item) - allowed)
    if stray:
        message = f"unknown keys {stray} beside {sorted(allowed & set(item))}"
        raise ApiError(400, "unknown_field", message, param=f"{param}.{stray[0]}")


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        message = f"must be a string, not {type(value).__name__}"
        raise ApiError(400, "invalid_type", message, param=param)
    return value


def _wrong_modality(got: str, param: str) -> ApiError:
    message = f"this model's modality is image; it cannot embed {got}"
    return ApiError(400, "unsupported_modality", message, param=param)


def decode_base64(reference: Reference, *, max_bytes: int) -> bytes:
    """Bytes of an inline image: a base64 data URI or bare base64, decoded strictly.

    Raises:
        ApiError: 400 for anything malformed, 413 for more than `max_bytes`.
    """
    text = reference.text
    if text[:5].lower() == "data:":
        head = _DATA_URI.match(text)
        if head is None or head[3] is None:
            message = "a data URI must read data:image/...;base64,..."
            raise ApiError(400, "invalid_data_uri", message, param=reference.param)
        if not _MEDIA_TYPE.fullmatch(head[1]):
            message = f"media type {head[1]!r} is not an image"
            raise ApiError(400, "unsupported_media_type", message, param=reference.param)
        text = text[head.end() :]
    if len(text) * 3 // 4 > max_bytes + 2:
        raise too_large(reference.param, max_bytes)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        message = "not a data URI, http(s) URL or base64 image; this model embeds images, not text"
        raise ApiError(400, "invalid_base64", message, param=reference.param) from error
    if len(data) > max_bytes:
        raise too_large(reference.param, max_bytes)
    return data


def too_large(param: str, max_bytes: int) -> ApiError:
    """413 for one image."""
    message = f"the image has more than {max_bytes} encoded bytes"
    return ApiError(413, "image_too_large", message, param=param)


def to_pixels(
    data: bytes, prep: Preprocessing, *, max_pixels: int, param: str
) -> npt.NDArray[np.uint8]:
    """Decodes and transforms one image exactly as evaluation and batch embedding do.

    Returns:
        uint8 [H, W, 3] with H = W = `prep.image_size`.

    Raises:
        ApiError: 400 with the decoder's reason as its code.
    """
    try:
        return eval_transform(decode_image(data, max_pixels=max_pixels), prep)
    except ImageError as error:
        raise ApiError(400, error.reason, f"unusable image: {error.detail}", param=param) from error
