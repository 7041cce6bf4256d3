"""Messages of `/v1/streams`: what a client may say, and what it is told.

Text messages are JSON objects with a `type`; binary ones are frames, or pieces of a container.
"""

from __future__ import annotations

import math
import struct
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from serve.embeddings.contract import ModelCard
from serve.embeddings.encoding import OutputOptions
from serve.embeddings.media.inputs import MAX_FPS
from serve.ingress.bodies import RequestModel, field_error, read_json
from serve.ingress.errors import ApiError

_TIMESTAMP = struct.Struct("<d")


class StreamStart(OutputOptions):
    """The first message of a client."""

    type: Literal["start"]
    model: str | None = None
    """A name from `GET /v1/models`; may be left out."""
    source: Literal["frames", "container"] = "frames"
    """What binary messages are: whole JPEG, PNG or WebP pictures, or the bytes of one MPEG-TS,
    Matroska, WebM or fragmented MP4, cut anywhere."""
    url: str | None = None
    """An http(s) address of such a container, which the server opens; there are no binary messages
    then."""
    every: int | None = Field(None, ge=1)
    """Frames from one embedding to the next; half a window by default."""
    fps: float | None = Field(None, gt=0, le=MAX_FPS, allow_inf_nan=False)
    """Use at most this many frames a second of the source's time and skip the others."""
    timestamps: bool = False
    """Each picture is preceded by its time: eight bytes, a little-endian double, in seconds.
    Otherwise its time is that of its arrival."""
    queue: int | None = Field(None, ge=1)
    """Frames that wait at most; the server's limit by default."""
    drop: Literal["oldest", "newest"] = "oldest"
    """Which frame is dropped when the queue is full."""
    unacknowledged: int = Field(8, ge=1, le=64)
    """Embeddings on their way at most. Further ones wait for `ack`, and frames behind them."""
    dimensions: int | None = Field(None, ge=1)
    """As in `POST /v1/embeddings`."""


class Acknowledgement(RequestModel):
    """All embeddings up to an index have been read."""

    type: Literal["ack"]
    index: int = Field(ge=0)


class End(RequestModel):
    """No more frames will come; those that wait are finished."""

    type: Literal["end"]


Control = Acknowledgement | End
_CONTROL: TypeAdapter[Control] = TypeAdapter(Annotated[Control, Field(discriminator="type")])


def parse_start(text: str, card: ModelCard) -> StreamStart:
    """Reads the first message.

    Raises:
        ApiError: 400, naming the field at fault.
    """
    start: StreamStart = _parse(text, TypeAdapter(StreamStart))
    if start.dimensions is not None and start.dimensions > card.dimensions:
        message = f"dimensions must lie between 1 and {card.dimensions}"
        raise ApiError(400, "invalid_value", message, param="dimensions")
    return start


def parse_control(text: str) -> Control:
    """Reads any later text message; raises as `parse_start`."""
    control: Control = _parse(text, _CONTROL)
    return control


def _parse(text: str, kind: TypeAdapter[Any]) -> Any:
    values = read_json(text.encode(errors="surrogatepass"), what="a message")
    try:
        return kind.validate_python(values)
    except ValidationError as error:
        told = field_error(error.errors(), values)
        code = "unknown_field" if told.code == "unknown_field" else "invalid_message"
        message = str(told) if told.param else f"message: {told}"
        raise ApiError(400, code, message, param=told.param) from error


def split_timestamp(data: bytes) -> tuple[float, bytes]:
    """Time and picture of a binary message with a timestamp.

    Raises:
        ApiError: 400, there is no finite time.
    """
    if len(data) < _TIMESTAMP.size:
        raise ApiError(400, "invalid_message", "a frame begins with the eight bytes of its time")
    (time_s,) = _TIMESTAMP.unpack_from(data)
    if not math.isfinite(time_s):
        raise ApiError(400, "invalid_message", f"a frame's time is {time_s}")
    return time_s, data[_TIMESTAMP.size :]
