"""Request, response and error types of the HTTP API, in the OpenAI shape.

A field that is not named here is refused: a misspelt `dimension` must not silently return
full-length embeddings.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]
Body = TypeVar("Body", bound=BaseModel)


class ApiError(Exception):
    """An error the client is told about; becomes `{"error": {message, type, param, code}}`.

    Args:
        status: HTTP status.
        code: stable machine-readable cause.
        message: what was wrong, for people.
        param: the request field at fault, e.g. `input[3]`.
        error_type: OpenAI's coarse class.
        headers: extra response headers.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        error_type: ErrorType = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.error_type = error_type
        self.headers = headers or {}

    def body(self) -> bytes:
        """The JSON reply."""
        error = {
            "message": self.message,
            "type": self.error_type,
            "param": self.param,
            "code": self.code,
        }
        return pydantic_core.to_json({"error": error})


def queue_full() -> ApiError:
    """429: as many images as allowed are waiting or running already."""
    return ApiError(
        429,
        "queue_full",
        "the server is at capacity; retry after the given delay",
        error_type="rate_limit_error",
        headers={"Retry-After": "1"},
    )


def server_error(status: int, code: str, message: str) -> ApiError:
    """5xx: not the client's fault, and safe to retry (embedding has no side effects)."""
    headers = {"Retry-After": "1"} if status == 503 else {}
    return ApiError(status, code, message, error_type="server_error", headers=headers)


_ITEM_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "description": "data URI, plain base64, or http(s) URL"},
        {"type": "object", "required": ["image"], "properties": {"image": {"type": "string"}}},
        {"type": "object", "required": ["url"], "properties": {"url": {"type": "string"}}},
        {"type": "object", "required": ["bytes"], "properties": {"bytes": {"type": "string"}}},
        {
            "type": "object",
            "required": ["video"],
            "properties": {
                "video": {"type": "string"},
                "fps": {"type": "number"},
                "start_s": {"type": "number"},
                "end_s": {"type": "number"},
            },
        },
        {
            "type": "object",
            "description": "content part of a video",
            "required": ["type", "video_url"],
            "properties": {
                "type": {"const": "video_url"},
                "video_url": {"type": "object", "properties": {"url": {"type": "string"}}},
            },
        },
        {
            "type": "object",
            "description": "OpenAI content part",
            "required": ["type", "image_url"],
            "properties": {
                "type": {"const": "image_url"},
                "image_url": {"type": "object", "properties": {"url": {"type": "string"}}},
            },
        },
        {
            "type": "object",
            "description": "one image_url or video_url part in a content list",
            "required": ["content"],
            "properties": {"content": {"type": "array", "items": {"type": "object"}}},
        },
    ]
}
_INPUT_SCHEMA = {"anyOf": [*_ITEM_SCHEMA["anyOf"], {"type": "array", "items": _ITEM_SCHEMA}]}


class EmbeddingRequest(BaseModel):
    """Body of `POST /v1/embeddings`."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)]
    """One image or video or a list of them; see `serve/inputs.py` for the accepted shapes."""
    model: str | None = None
    """A name from `GET /v1/models`; may be left out."""
    encoding_format: Literal["float", "base64"] = "float"
    """JSON numbers, or the float32 values little-endian in base64."""
    dimensions: int | None = None
    """Keep this many leading dimensions, then scale to unit length again."""
    pooling: Literal["mean", "per_frame", "patches"] = "mean"
    """One vector an item, one a time step of its tokens, or one a token (time first, then raster
    order)."""
    normalize: bool = True
    """Scale every vector to unit length, as OpenAI's are."""
    modality: str | None = None
    """infinity's field: `image` or `video`, which is what bare strings, URLs and bytes then are."""
    user: str | None = None
    """OpenAI's field; ignored."""


class Embedding(BaseModel):
    """One item's embedding."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | list[list[float]] | str
    """[dimensions], [steps, dimensions] for `pooling: per_frame`, [tokens, dimensions] for
    `pooling: patches`; base64 text if asked for."""
    shape: list[int] | None = None
    """Shape of `embedding` (not with `pooling: mean`)."""
    times_s: list[float] | None = None
    """When the sampled frames are shown, seconds after the first frame (only of videos)."""


class Usage(BaseModel):
    """What the request cost: a token is a patch the encoder read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """Reply of `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    """One entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    """Unix time at which this replica loaded the model."""
    owned_by: str = "rayjepa"
    modality: Literal["image", "video"] = "image"
    """What the encoder was trained on; each takes the other too."""
    dimensions: int
    """Length of an embedding."""
    num_patches: int
    """Vectors per image, and per time step of a clip, with `pooling: patches`."""
    image_size: int
    """Pixels on a side of the encoder's square input."""
    frames: int
    """Frames of a full clip; 1 for an encoder of images."""
    tubelet: int
    """Frames in a time step."""


class ModelList(BaseModel):
    """Reply of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: ErrorType
    param: str | None = Field(None, description="the request field at fault")
    code: str | None = Field(None, description="stable machine-readable cause")


class ErrorResponse(BaseModel):
    """Every reply with a status of 400 or above that this application sends."""

    error: ErrorDetail


def parse_request(body: bytes) -> EmbeddingRequest:
    """Parses and validates the body of an embedding request; raises as `parse_body` does."""
    return parse_body(body, EmbeddingRequest)


def parse_body(body: bytes, kind: type[Body]) -> Body:
    """Parses and validates a request body.

    Raises:
        ApiError: 400 for text that is not strict JSON (NaN and Infinity are not, nor is very deep
            nesting), or for the first field at fault.
    """
    try:
        values = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ApiError(400, "invalid_type", "the body must be a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _field_error(error, kind) from error


def _field_error(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    # A stray field is reported before a missing one: it is usually the missing one, misspelt.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    param = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = f"; known: {', '.join(kind.model_fields)}" if len(problem["loc"]) == 1 else ""
        return ApiError(400, "unknown_field", f"unknown field {param!r}{known}", param=param)
    if not problem["loc"]:  # a check of several fields; its message names the one at fault
        message = str(problem["ctx"]["error"])
        return ApiError(400, "invalid_value", message, param=message.partition(":")[0])
    code = "missing_field" if problem["type"] == "missing" else "invalid_value"
    return ApiError(400, code, f"{param}: {problem['msg']}", param=param)
