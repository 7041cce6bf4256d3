"""Typed errors, in the OpenAI shape."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field
from starlette.responses import Response

from serve.ingress.json_text import to_json

LONGEST_TOLD = 2000
"""Characters of a message, and of the name of a field: what a client sent may stand in them."""

ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]


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
        message = _shortened(message)
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param if param is None else _shortened(param)
        self.error_type = error_type
        self.headers = headers or {}

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
    """What went wrong."""

    message: str
    type: ErrorType
    param: str | None = Field(None, description="the request field at fault")
    code: str | None = Field(None, description="stable machine-readable cause")


class ErrorResponse(BaseModel):
    """Every reply with a status of 400 or above that an application sends."""

    error: ErrorDetail


def queue_full() -> ApiError:
    """429: as much as allowed is waiting or running already."""
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


def error_response(error: ApiError) -> Response:
    """The reply that tells a client of an error."""
    return Response(error.body(), error.status, error.headers, media_type="application/json")
