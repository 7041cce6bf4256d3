"""Messages that a client may send on `/v1/streams`.

Text messages are JSON objects with a `type`. Binary messages are frames or pieces of a container.
"""

from __future__ import annotations

import math
import struct
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from serve.embeddings.encoding import OutputOptions
from serve.embeddings.media.inputs import MAX_FPS
from serve.embeddings.regions import RegionOptions
from serve.ingress.bodies import RequestModel, field_error, read_json
from serve.ingress.errors import ApiError

_TIMESTAMP = struct.Struct("<d")


class StreamStart(OutputOptions, RegionOptions):
    """The first message of a client."""

    type: Literal["start"]
    model: str | None = None
    """A name from `GET /v1/models`; may be left out."""
    source: Literal["frames", "container"] = "frames"
    """Content of binary messages: a whole JPEG, PNG or WebP picture each, or the bytes of one
    MPEG-TS, Matroska, WebM or fragmented MP4 container, divided anywhere."""
    url: str | None = None
    """The http(s) URL of such a container, for the server to open; the client then sends no binary
    messages."""
    every: int | None = Field(None, ge=1)
    """Number of frames from one embedding to the next; half a window by default."""
    fps: float | None = Field(None, gt=0, le=MAX_FPS, allow_inf_nan=False)
    """Frames to use for each second of the source's time at most; the others are skipped."""
    timestamps: bool = False
    """Whether the time precedes each picture, in seconds as a little-endian double of eight bytes.
    Otherwise the time of arrival is used."""
    queue: int | None = Field(None, ge=1)
    """Frames that may wait at most; the server's limit by default."""
    drop: Literal["oldest", "newest"] = "oldest"
    """Which frame to drop if the queue is full."""
    unacknowledged: int = Field(8, ge=1, le=64)
    """Embeddings that may be sent before the client acknowledges them; further ones wait, and
    frames with them."""
    dimensions: int | None = Field(None, ge=1)
    """As in `POST /v1/embeddings`."""


class Acknowledgement(RequestModel):
    """Says that the client has read all embeddings up to an index."""

    type: Literal["ack"]
    index: int = Field(ge=0)


class End(RequestModel):
    """Says that no more frames will come; those that wait are still embedded."""

    type: Literal["end"]


Control = Acknowledgement | End
_CONTROL: TypeAdapter[Control] = TypeAdapter(Annotated[Control, Field(discriminator="type")])


def parse_start(text: str) -> StreamStart:
    """Reads the first message.

    Raises:
        ApiError: 400, which names the field at fault.
    """
    start: StreamStart = _parse(text, TypeAdapter(StreamStart))
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
    """Returns time and picture of a binary message with a timestamp.

    Raises:
        ApiError: 400, the message has no finite time.
    """
    if len(data) < _TIMESTAMP.size:
        raise ApiError(400, "invalid_message", "a frame begins with the eight bytes of its time")
    (time_s,) = _TIMESTAMP.unpack_from(data)
    if not math.isfinite(time_s):
        raise ApiError(400, "invalid_message", f"a frame's time is {time_s}")
    return time_s, data[_TIMESTAMP.size :]
