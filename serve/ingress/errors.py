"""Errors that clients are told about, in OpenAI's form."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, Field
from starlette.responses import Response

from serve.ingress.json_text import to_json

LONGEST_TOLD = 2000
"""Characters of a message or of a field's name at most, for both may repeat what a client sent."""

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class ApiError(Exception):
    """An error that the client is told about as `{"error": {message, type, param, code}}`.

    It can be pickled, so that a replica can return it to an ingress.

    Args:
        status: HTTP status.
        code: stable name of the cause, for programs.
        message: what was wrong, for people.
        param: the request field at fault, such as `input[3]`.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        message = _shortened(message)
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param if param is None else _shortened(param)
        self.headers = headers or {}

    def __reduce__(self) -> tuple[Any, ...]:
        make = partial(ApiError, param=self.param, headers=self.headers)
        return make, (self.status, self.code, self.message)

    @property
    def error_type(self) -> ErrorType:
        """OpenAI's coarse class, which the status decides."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def content(self) -> dict[str, Any]:
        """Returns the error as OpenAI's servers write it."""
        error = {
            "message": self.message,
            "type": self.error_type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def body(self) -> bytes:
        """Returns the JSON text of `content`."""
        return to_json(self.content())


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TOLD else f"{text[: LONGEST_TOLD - 3]}..."


class ErrorDetail(BaseModel):
    """The content of an error."""

    message: str
    type: ErrorType
    param: str | None = Field(None, description="the request field at fault")
    code: str | None = Field(None, description="stable machine-readable cause")


class ErrorResponse(BaseModel):
    """Body of every reply whose status is 400 or above."""

    error: ErrorDetail


def queue_full() -> ApiError:
    """Returns the 429 for a request that arrives while all places are taken."""
    return ApiError(
        429,
        "queue_full",
        "the server is at capacity; retry after the given delay",
        headers={"Retry-After": "1"},
    )


def server_error(status: int, code: str, message: str) -> ApiError:
    """Returns a 5xx: the client is not at fault and may send the request again."""
    headers = {"Retry-After": "1"} if status == 503 else {}
    return ApiError(status, code, message, headers=headers)


def error_response(error: ApiError) -> Response:
    """Returns the HTTP reply for an error."""
    return Response(error.body(), error.status, error.headers, media_type="application/json")
