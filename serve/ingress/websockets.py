"""Errors over a WebSocket: a last JSON message, then the close code for that error."""

from __future__ import annotations

from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from serve.ingress.errors import ApiError
from serve.ingress.json_text import to_json

NORMAL, BAD_DATA = 1000, 1007
"""Close codes of RFC 6455 (section 7.4.1)."""

SERVICE_RESTART = 1012
"""From IANA's registry: the client may connect again at once."""

# The others, also from IANA's registry, by the status that the error would have over HTTP.
_CLOSE_CODES = {
    401: 1008,
    403: 1008,
    408: 1008,
    413: 1009,
    429: 1013,
    500: 1011,
    503: 1013,
    504: 1013,
}


async def refuse(websocket: WebSocket, error: ApiError) -> None:
    """Sends an error as the last message, and closes with the code for that error."""
    try:
        await websocket.send_text(error_message(error))
        await websocket.close(close_code(error), error.code)
    except (WebSocketDisconnect, RuntimeError):
        return  # the client has left meanwhile


def error_message(error: ApiError) -> str:
    """Returns the last message before the server closes a WebSocket because of an error."""
    return to_text({"type": "error"} | error.content())


def close_code(error: ApiError) -> int:
    """Returns the WebSocket close code for an error."""
    if error.code in ("model_changed", "going_away"):
        return SERVICE_RESTART
    if error.code in ("url_not_allowed", "invalid_url"):
        return 1008
    return _CLOSE_CODES.get(error.status, BAD_DATA)


def to_text(message: dict[str, Any]) -> str:
    """Returns the JSON text of a message."""
    return to_json(message).decode()
