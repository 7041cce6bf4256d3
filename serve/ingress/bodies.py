"""Request bodies: strict JSON where `null` means absent, and errors that say what is expected."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from starlette.requests import Request
from starlette.responses import Response

from serve.ingress.errors import ApiError, server_error

Body = TypeVar("Body", bound=BaseModel)

_SHOULD_BE = "Input should be "
# Pydantic's own words name our classes.
_OBJECT_TYPES = {"model_type", "model_attributes_type", "dict_type"}


class RequestModel(BaseModel):
    """Base of everything that clients send: unknown fields are refused, values are not converted.

    `null` means absent, because clients serialise arguments that their caller left out as `null`. A
    required field keeps its `null`, so that the error names that value.
    """

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)
    null_means_something: ClassVar[frozenset[str]] = frozenset()
    """Fields for which `null` and absence mean different things."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        kept = required | cls.null_means_something
        return {name: value for name, value in values.items() if value is not None or name in kept}


def describe_body(kind: type[BaseModel], *, required: bool = True) -> dict[str, Any]:
    """Returns OpenAPI's description of a body, for a route that reads it without FastAPI."""
    schema = kind.model_json_schema()
    schema = _inlined(schema, schema.pop("$defs", {}))
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": required, "content": content}}


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """Replaces references by what they refer to: pydantic's are not valid inside a route."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node.pop("$ref").rpartition("/")[2]
        node = definitions[name] | node
    return {key: _inlined(value, definitions) for key, value in node.items()}


def read_json(text: bytes, *, what: str) -> Any:
    """Reads strict JSON in UTF-8; a byte-order mark in front of it is skipped.

    Args:
        text: the JSON.
        what: what it is, for the error's message.

    Raises:
        ApiError: 400, also for NaN and Infinity (JSON has neither) and for very deep nesting.
    """
    try:
        return pydantic_core.from_json(text.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        is_other = text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        why = "send UTF-8, not UTF-16" if is_other else str(error)
        raise ApiError(400, "invalid_json", f"{what} is not valid JSON: {why}") from error


async def answer_in_time(
    request: Request, answer: Callable[[bytes], Awaitable[bytes]], timeout_s: float
) -> Response:
    """Reads a body and answers it with JSON, both within a time.

    Raises:
        ApiError: 504, when the time is over.
    """
    try:
        async with asyncio.timeout(timeout_s):
            reply = await answer(await request.body())
    except TimeoutError as error:
        raise server_error(504, "timeout", f"no reply within {timeout_s:g} s") from error
    return Response(reply, media_type="application/json")


def check_content_type(request: Request) -> None:
    """Raises a 415 for anything but uncompressed JSON."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        message = f"send application/json, not {content_type or 'an unlabelled body'}"
        raise ApiError(415, "unsupported_content_type", message)
    if request.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise ApiError(415, "unsupported_content_encoding", "send the body uncompressed")


def read_object(body: bytes) -> dict[str, Any]:
    """Reads a request body.

    Raises:
        ApiError: 400, as `read_json`, or because the body is not an object.
    """
    values = read_json(body, what="the body")
    if not isinstance(values, dict):
        raise ApiError(400, "invalid_type", "the body must be a JSON object")
    return values


def parse_body(body: bytes, kind: type[Body]) -> Body:
    """Reads and validates a request body.

    Raises:
        ApiError: 400, as `read_object`, or for the first field at fault.
    """
    values = read_object(body)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise field_error(error.errors(), values, known=kind.model_fields) from error


def field_error(errors: Iterable[Any], values: Any, *, known: Iterable[str] = ()) -> ApiError:
    """Returns a 400 for the first field at fault.

    Args:
        errors: what pydantic found.
        values: what was validated.
        known: names of all fields, listed in the error for an unknown one.
    """
    problem = _first([_problem(error, values) for error in errors])
    param = ".".join(problem.path)
    if problem.kind == "extra_forbidden":
        listed = f"; known: {', '.join(known)}" if known and len(problem.path) == 1 else ""
        return ApiError(400, "unknown_field", f"unknown field {param!r}{listed}", param=param)
    if problem.check:  # a check over several fields, whose message names the one at fault
        return ApiError(400, "invalid_value", problem.message, param=problem.check)
    code = "missing_field" if problem.kind == "missing" else "invalid_value"
    message = f"{param}: {problem.message}" if param else problem.message
    return ApiError(400, code, message, param=param or None)


@dataclass(frozen=True)
class _Problem:
    """One of pydantic's errors.

    Attributes:
        path: keys and indices that lead to the value at fault in what was sent.
        kind: pydantic's name of the error.
        message: explanation for people.
        branches: (length of the path, name of the form) for each union on the way.
        check: the field that a check of the whole model names, else empty.
    """

    path: tuple[str, ...]
    kind: str
    message: str
    branches: tuple[tuple[int, str], ...]
    check: str = ""


def _problem(detail: Any, value: Any) -> _Problem:
    """Separates, in pydantic's location, keys that were sent from names of a union's forms."""
    path: list[str] = []
    branches: list[tuple[int, str]] = []
    kind, location = detail["type"], detail["loc"]
    for place, part in enumerate(location, 1):
        is_missing = kind == "missing" and place == len(location)
        if isinstance(value, dict) and (part in value or is_missing):
            path.append(str(part))
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            path.append(str(part))
            value = value[part]
        else:
            branches.append((len(path), str(part)))
    if kind != "value_error":
        message = f"{_SHOULD_BE}an object" if kind in _OBJECT_TYPES else detail["msg"]
        return _Problem(tuple(path), kind, message, tuple(branches))
    message = str(detail["ctx"]["error"])
    check = ".".join([*path, message.partition(":")[0]])
    return _Problem(tuple(path), kind, message, tuple(branches), check)


def _first(problems: list[_Problem]) -> _Problem:
    """Returns the problem to report; for a union, that of the form which comes closest.

    An unknown field is reported before a missing one: it is usually the missing one, misspelt. A
    wrong `type` or `role` comes before both, because the other fields depend on it.
    """

    def place(problem: _Problem) -> int:
        if problem.kind == "literal_error" and problem.path[-1:] in (("type",), ("role",)):
            return 0
        return 1 if problem.kind == "extra_forbidden" else 2

    plain = [problem for problem in problems if not problem.branches]
    unions: dict[tuple[str, ...], dict[str, list[_Problem]]] = {}
    for problem in problems:
        if problem.branches:
            (depth, form), *rest = problem.branches
            inner = replace(problem, branches=tuple(rest))
            unions.setdefault(problem.path[:depth], {}).setdefault(form, []).append(inner)
    plain += [_nearest(forms, len(path)) for path, forms in unions.items()]
    return min(plain, key=place)


def _nearest(forms: dict[str, list[_Problem]], depth: int) -> _Problem:
    """Returns what is wrong with the closest form of a union, or with several equally close."""

    def distance(problems: list[_Problem]) -> tuple[bool, int, int, int]:
        others = [problem for problem in problems if problem.kind.endswith("_type")]
        is_other = any(len(problem.path) == depth for problem in others)
        deepest = max(len(problem.path) for problem in problems)
        return is_other, len(others), len(problems), -deepest

    least = min(map(distance, forms.values()))
    first, *others = [_first(found) for found in forms.values() if distance(found) == least]
    message = first.message
    for other in others:
        if other.path != first.path:
            message += f"; or {'.'.join(other.path)}: {other.message}"
        elif (shorter := other.message.removeprefix(_SHOULD_BE)) not in message:
            message += f", or {shorter}"
    return replace(first, message=message)
