"""Request and response types of the embeddings API, in OpenAI's form.

Unknown fields are refused, so that a misspelt `dimension` does not silently return embeddings of
full length.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, WithJsonSchema

from models.media.fit import Fit
from serve.embeddings.contract import How
from serve.embeddings.encoding import OutputOptions
from serve.embeddings.regions import RegionOptions
from serve.ingress.bodies import parse_body
from serve.replicas.model_routes import ModelEntry

_ITEM_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1, "description": "data URI, base64, or http(s) URL"},
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


class EmbeddingRequest(OutputOptions, RegionOptions):
    """Body of `POST /v1/embeddings`."""

    input: Annotated[Any, WithJsonSchema(_INPUT_SCHEMA)]
    """One image or video, or a list of them, in a form that `media/inputs.py` reads."""
    model: str | None = None
    """A name from `GET /v1/models`; may be left out."""
    modality: str | None = None
    """infinity's field: `image` or `video`, the kind of bare strings, URLs and bytes."""
    user: str | None = None
    """OpenAI's field; ignored."""


class Embedding(BaseModel):
    """The embedding of one item."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | list[list[float]] | str
    """[dimensions], [steps, dimensions] for `pooling: per_frame`, [tokens, dimensions] for
    `pooling: patches`, [steps, patches] for `pooling: surprise`; base64 text if asked for."""
    shape: list[int] | None = None
    """Shape of `embedding`; absent with `pooling: mean`."""
    grid: list[int] | None = None
    """Rows and columns of the picture's patches; only with `pooling: patches` and `surprise`."""
    surprise: list[float] | None = None
    """Surprise of each time step as a whole; only with `pooling: surprise`."""
    kept: list[int] | None = None
    """Numbers of the patches that were encoded, in raster order of the grid and the same in all
    time steps; only with `pooling: patches`, and only if some were left out."""
    times_s: list[float] | None = None
    """Times of the sampled frames of a video, in seconds after the first frame."""


class Usage(BaseModel):
    """Cost of the request; a token is a patch that the encoder read."""

    prompt_tokens: int
    total_tokens: int


class Notice(BaseModel):
    """Something that a client should know about pictures that were embedded."""

    code: Literal["aspects_differ"] = "aspects_differ"
    message: str
    items: list[int]
    """Indices of the items in `data`."""


class EmbeddingResponse(BaseModel):
    """Reply of `POST /v1/embeddings`."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    fingerprint: str
    """Digest of the model's weights, its preprocessing and its name: embeddings with the same one
    may be compared. See `Model`."""
    usage: Usage
    warnings: list[Notice] | None = None
    """Present where the aspect of a picture differs from the model's by more than 5%, unless
    pictures get grids of their own."""


class Model(ModelEntry):
    """What `GET /v1/models` tells of an encoder."""

    modality: Literal["image", "video"] = "image"
    """What the encoder was trained on; either kind of encoder accepts both."""
    dimensions: int
    """Length of an embedding."""
    num_patches: int
    """Vectors of an image, and of each time step of a clip, with `pooling: patches`; the most of
    them where the fit is `whole` or something is left out."""
    image_size: int | list[int]
    """Side of the encoder's square input in pixels, or [height, width]."""
    grid: list[int]
    """Rows and columns of the encoder's patches; with the fit `whole`, pictures have their own."""
    fit: Fit
    """How a picture is fitted to the input."""
    exclude: list[list[float]]
    """Regions that are left out unless a request says otherwise: [left, top, right, bottom], as
    fractions of the picture's width and height."""
    frames: int
    """Frames of a full clip; 1 for an image encoder."""
    tubelet: int
    """Frames in a time step."""
    alignment: How | None
    """How the map that brings the embeddings to those of old footage was fitted; null without
    one."""
    surprise: bool
    """Whether `pooling: surprise` is answered."""


def parse_request(body: bytes) -> EmbeddingRequest:
    """Parses and validates the body of an embedding request; raises as `parse_body` does."""
    return parse_body(body, EmbeddingRequest)
