"""Reads `input` of an embedding request in all forms that clients send.

OpenAI's strings, lists and content parts, and the objects of infinity and Jina, become a list of
references. A reference is a URL or base64, with its path in the request for error messages.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from models.media.images import decode_image
from models.media.pictures.errors import ImageError
from models.media.preprocessing import EncoderInput, Preprocessing, eval_transform
from serve.embeddings.contract import Decoded
from serve.embeddings.media.base64_text import BLANK, decode, split_data_uri
from serve.embeddings.media.fitting import layout_of
from serve.ingress.errors import ApiError

_DATA_URI = re.compile(r"data:", re.IGNORECASE)
_MEDIA_TYPE = {
    "image": re.compile(r"(image/[a-z0-9.+-]+|application/octet-stream)?", re.IGNORECASE),
    "video": re.compile(r"(video/[a-z0-9.+-]+|image/gif|application/octet-stream)?", re.IGNORECASE),
}
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_VIDEO_URI = re.compile(r"data:video/", re.IGNORECASE)
_FOREIGN = ("text", "audio", "input_audio", "audio_url")
_SAMPLING = ("fps", "start_s", "end_s")
MAX_FPS = 240.0
_JSON_NAMES: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}

Kind = Literal["image", "video"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which frames of a video to take: `fps` a second, or evenly as many as the model takes."""

    fps: float | None = None
    start_s: float = 0.0
    end_s: float | None = None


@dataclass(frozen=True)
class Reference:
    """One image or video of a request.

    Attributes:
        param: path of the item in the request, for error messages.
        text: a URL, a data URI or base64.
        is_url: whether the text is a URL.
        sampling: which frames of a video to take; None for an image.
    """

    param: str
    text: str
    is_url: bool
    sampling: Sampling | None = None

    @property
    def kind(self) -> Kind:
        """Whether it is an image or a video."""
        return "image" if self.sampling is None else "video"


def parse_input(value: Any, *, max_items: int, default: Kind = "image") -> list[Reference]:
    """Turns `input` into references, in order.

    Args:
        value: the request's `input`.
        max_items: items at most.
        default: kind of items that do not say it (bare strings, `url`, `bytes`).

    Raises:
        ApiError: 400, which names the first item at fault.
    """
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ApiError(400, "empty_input", "input must hold at least one item", param="input")
    if len(items) > max_items:
        message = f"input holds {len(items)} items; at most {max_items} are allowed"
        raise ApiError(400, "too_many_items", message, param="input")
    if value is not items:
        return [_reference(value, "input", default)]
    return [_reference(item, f"input[{index}]", default) for index, item in enumerate(items)]


def parse_image(value: Any, param: str) -> Reference:
    """Turns one image, in any of the forms of an item of `input`, into a reference.

    Args:
        value: the item.
        param: its path in the request.

    Raises:
        ApiError: 400, it is malformed or a video.
    """
    reference = _reference(value, param, "image")
    if reference.kind == "video":
        message = "must be a single image, not a video"
        raise ApiError(400, "unsupported_modality", message, param=reference.param)
    return reference


def _reference(item: Any, param: str, default: Kind) -> Reference:
    if isinstance(item, str):
        item = item.strip(BLANK)
        is_video = default == "video" or _VIDEO_URI.match(item) is not None
        is_url = _URL.match(item) is not None
        return Reference(param, item, is_url, Sampling() if is_video else None)
    if isinstance(item, dict):
        return _object_reference(item, param, default)
    if any(type(number) is int for number in (item if isinstance(item, list) else [item])):
        raise _wrong_modality("token ids", param)
    message = f"an item is a string or an object, not {_JSON_NAMES[type(item)]}"
    raise ApiError(400, "invalid_type", message, param=param)


def _object_reference(item: dict[str, Any], param: str, default: Kind) -> Reference:
    item = _given(item)
    for foreign in _FOREIGN:
        if foreign in item or item.get("type") == foreign:
            raise _wrong_modality(foreign, param)
    if "content" in item:
        return _content_reference(item, param, default)
    for key in ("image_url", "video_url"):
        if key in item:
            return _part_reference(item, param, key)
    keys = [key for key in ("image", "video", "url", "bytes") if key in item]
    if len(keys) != 1:
        message = "an object has one of image, video, url, bytes, image_url, video_url, content"
        raise ApiError(400, "invalid_object", message, param=param)
    key = keys[0]
    text = _text(item[key], f"{param}.{key}")
    is_named = key in ("image", "video")
    is_video = _VIDEO_URI.match(text) is not None if key != "image" else False
    is_video = is_video or (key if is_named else default) == "video"
    _only_keys(item, {key, *_SAMPLING} if is_video else {key}, param)
    is_url = key == "url" or (is_named and _URL.match(text) is not None)
    # A data URI may stand under `url`, too.
    is_url = is_url and _DATA_URI.match(text) is None
    sampling = parse_sampling(item, param) if is_video else None
    return Reference(f"{param}.{key}", text, is_url, sampling)


def parse_sampling(item: dict[str, Any], param: str) -> Sampling:
    """Reads `fps`, `start_s` and `end_s` of a video; `null` means absent.

    Raises:
        ApiError: 400 for a value that makes no sense.
    """
    values = {key: value for key, value in _given(item).items() if key in _SAMPLING}
    for key, value in values.items():
        most = MAX_FPS if key == "fps" else math.inf
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        least_ok = is_number and (value >= 0 if key == "start_s" else value > 0)
        if not least_ok or value > most:
            message = f"{key} must be a number of sensible size, got {value!r}"
            raise ApiError(400, "invalid_value", message[:200], param=f"{param}.{key}")
    sampling = Sampling(**values)
    if sampling.end_s is not None and sampling.end_s <= sampling.start_s:
        message = "end_s must be after start_s"
        raise ApiError(400, "invalid_value", message, param=f"{param}.end_s")
    return sampling


def _content_reference(item: dict[str, Any], param: str, default: Kind) -> Reference:
    _only_keys(item, {"content", "role"}, param)
    parts = item["content"]
    if not isinstance(parts, list) or len(parts) != 1 or not isinstance(parts[0], dict):
        message = (
            "content must be a list of exactly one image_url or video_url part (one vector an item)"
        )
        raise ApiError(400, "invalid_content", message, param=f"{param}.content")
    if "content" in parts[0]:
        raise ApiError(400, "invalid_content", "content does not nest", param=f"{param}.content[0]")
    return _object_reference(parts[0], f"{param}.content[0]", default)


def _part_reference(part: dict[str, Any], param: str, key: str) -> Reference:
    """Reads a content part; `key` is `image_url` or `video_url`."""
    is_video = key == "video_url"
    _only_keys(part, {"type", key, *_SAMPLING} if is_video else {"type", key}, param)
    if part.get("type", key) != key:
        message = f"a part with {key} has type {key}, not {part['type']!r}"
        raise ApiError(400, "invalid_content", message, param=f"{param}.type")
    target = part[key]
    if isinstance(target, dict):
        target = _given(target)
        _only_keys(target, {"url", "detail"}, f"{param}.{key}")
        target = target.get("url")
    text = _text(target, f"{param}.{key}.url")
    sampling = parse_sampling(part, param) if is_video else None
    return Reference(f"{param}.{key}.url", text, _URL.match(text) is not None, sampling)


def _given(item: dict[str, Any]) -> dict[str, Any]:
    """Returns an object without the fields that are `null`."""
    return {key: value for key, value in item.items() if value is not None}


def _only_keys(item: dict[str, Any], allowed: set[str], param: str) -> None:
    stray = sorted(set(item) - allowed)
    if stray:
        message = f"unknown keys {stray} beside {sorted(allowed & set(item))}"
        raise ApiError(400, "unknown_field", message, param=f"{param}.{stray[0]}")


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        message = f"must be a string, not {_JSON_NAMES[type(value)]}"
        raise ApiError(400, "invalid_type", message, param=param)
    return value.strip(BLANK)


def _wrong_modality(got: str, param: str) -> ApiError:
    message = f"this server embeds images and videos; it cannot embed {got}"
    return ApiError(400, "unsupported_modality", message, param=param)


def decode_base64(reference: Reference, *, max_bytes: int) -> bytes:
    """Returns the bytes of an image or video that is sent as a data URI or bare base64.

    Raises:
        ApiError: 400 if the text is malformed, 413 for more than `max_bytes`.
    """
    text, is_uri = reference.text, _DATA_URI.match(reference.text) is not None
    try:
        if is_uri:
            media_type, text = split_data_uri(text)
            _check_media_type(media_type, reference)
    except ValueError as error:
        message = f"a data URI must read data:{reference.kind}/...;base64,...: {error}"
        raise ApiError(400, "invalid_data_uri", message, param=reference.param) from error
    try:
        data = decode(text, is_uri=is_uri)
    except ValueError as error:
        message = f"the base64 of the data URI {error}"
        if not is_uri:
            message = (
                f"not a data URI or http(s) URL, and as base64 it {error}; text is not embedded"
            )
        raise ApiError(400, "invalid_base64", message, param=reference.param) from error
    if len(data) > max_bytes:
        raise too_large(reference, max_bytes)
    return data


def _check_media_type(media_type: str, reference: Reference) -> None:
    if not _MEDIA_TYPE[reference.kind].fullmatch(media_type):
        shown = media_type[:80]
        message = f"media type {shown!r} is not that of the {reference.kind} it should be"
        raise ApiError(400, "unsupported_media_type", message, param=reference.param)


def too_large(reference: Reference, max_bytes: int) -> ApiError:
    """Returns the 413 for an image or video that is too long."""
    message = f"the {reference.kind} has more than {max_bytes} encoded bytes"
    return ApiError(413, f"{reference.kind}_too_large", message, param=reference.param)


def to_input(data: bytes, prep: Preprocessing, *, max_pixels: int, param: str) -> Decoded:
    """Decodes and transforms one image as evaluation and batch embedding do.

    Raises:
        ApiError: 400 with the decoder's reason as its code, or because nothing of it is kept.
    """
    try:
        image = decode_image(
            data, max_pixels=max_pixels, background=prep.background, deep_range=prep.deep_range
        )
    except ImageError as error:
        raise ApiError(400, error.reason, f"unusable image: {error.detail}", param=param) from error
    size = (image.height, image.width)
    kept = layout_of(size, prep).kept
    return Decoded(EncoderInput(eval_transform(image, prep), kept), size)
