"""FastAPI routes with a typed body, with our own reading of JSON and our own errors.

FastAPI's own reading accepts NaN and UTF-16, and turns whatever goes wrong while it reads (a client
that leaves, a body that does not arrive) into the same 400. So a route of this class reads and
parses the body first, and FastAPI only validates it and describes it in OpenAPI.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from serve.ingress.bodies import check_content_type, field_error, read_object


class JsonRoute(APIRoute):
    """A route whose typed body is strict JSON; routes without a body are FastAPI's own."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns the function that answers a request of this route.

        That function raises:
            ApiError: 415 or 400, for a body that the route does not accept.
        """
        handle, field = super().get_route_handler(), self.body_field
        if field is None:
            return handle
        is_required = field.field_info.is_required()
        known = getattr(field.field_info.annotation, "model_fields", ())

        async def parse_and_handle(request: Request) -> Response:
            if is_required:
                check_content_type(request)
            text = await request.body()
            if not text and not is_required:
                return await handle(request)
            check_content_type(request)
            values = read_object(text)
            try:
                return await handle(_ParsedRequest(request, text, values))
            except RequestValidationError as error:
                problems = [{**each, "loc": each["loc"][1:]} for each in error.errors()]
                raise field_error(problems, values, known=known) from error

        return parse_and_handle


class _ParsedRequest(Request):
    """A request whose body has been read and parsed before FastAPI asks for it."""

    def __init__(self, request: Request, text: bytes, values: dict[str, Any]) -> None:
        super().__init__(request.scope, request.receive)
        self._text, self._values = text, values

    async def body(self) -> bytes:
        """Returns the bytes of the body."""
        return self._text

    async def json(self) -> dict[str, Any]:
        """Returns the parsed body."""
        return self._values
