"""Request bodies and stream messages: `null` means absent, errors say what was expected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from serve.embeddings.frontend.schemas import EmbeddingRequest
from serve.embeddings.media.inputs import parse_image, parse_input
from serve.embeddings.streams import messages as stream_messages
from serve.embeddings.streams.messages import parse_control, parse_start
from serve.ingress.bodies import RequestModel, parse_body
from serve.ingress.errors import ApiError
from serve.lm.frontend import schemas as lm_schemas
from serve.lm.frontend.schemas import ChatRequest, CompletionRequest, CreateSession, TokenizeRequest
from serve.planning.frontend.schemas import PlanRequest, PredictRequest

# What a model's body must hold at least.
LEAST: dict[type[RequestModel], dict[str, Any]] = {
    EmbeddingRequest: {"input": "aGk="},
    PlanRequest: {"observation": "aGk=", "goal": "aGk="},
    PredictRequest: {"frames": "aGk=", "actions": [[0.0]]},
    TokenizeRequest: {"prompt": "a"},
    lm_schemas.DetokenizeRequest: {"tokens": [1]},
    lm_schemas.Message: {"role": "user", "content": "a"},
    lm_schemas.TextPart: {"type": "text", "text": "a"},
    stream_messages.StreamStart: {"type": "start"},
    stream_messages.Acknowledgement: {"type": "ack", "index": 0},
    stream_messages.End: {"type": "end"},
}
CARD: Any = SimpleNamespace(dimensions=32)
SAID: Any = {"role": "user", "content": "hi"}


def models(base: type[RequestModel] = RequestModel) -> Iterator[type[RequestModel]]:
    for model in base.__subclasses__():
        yield model
        yield from models(model)


def fields(*, required: bool) -> list[Any]:
    return [
        pytest.param(model, name, id=f"{model.__name__}.{name}")
        for model in models()
        for name, field in model.model_fields.items()
        if field.is_required() == required
    ]


def parsed(model: type[RequestModel], values: Any) -> dict[str, Any]:
    return parse_body(json.dumps(values).encode(), model).model_dump()


def refused(model: type[RequestModel], values: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_body(json.dumps(values).encode(), model)
    assert caught.value.status == 400
    return caught.value


def test_all_request_models_are_found() -> None:
    names = {model.__name__ for model in models()}
    assert {
        "EmbeddingRequest",
        "StreamStart",
        "ChatRequest",
        "StreamOptions",
        "ForkSession",
    } <= names
    assert len(fields(required=False)) > 80


@pytest.mark.parametrize(("model", "name"), fields(required=False))
def test_null_means_absent(model: type[RequestModel], name: str) -> None:
    least = {key: value for key, value in LEAST.get(model, {}).items() if key != name}
    if model is TokenizeRequest and name == "prompt":
        least["messages"] = [SAID]  # one of the two
    given = parse_body(json.dumps(least | {name: None}).encode(), model)
    assert given.model_dump() == parsed(model, least)
    assert (name in given.model_fields_set) == (name in model.null_means_something)


@pytest.mark.parametrize(("model", "name"), fields(required=True))
def test_null_for_a_required_field_is_refused(model: type[RequestModel], name: str) -> None:
    if model is EmbeddingRequest:  # its shapes are read by hand
        with pytest.raises(ApiError) as caught:
            parse_input(None, max_items=1)
        assert (caught.value.code, caught.value.param) == ("invalid_type", "input")
        return
    if name in ("observation", "goal", "frames"):  # as are those of a frame
        with pytest.raises(ApiError) as caught:
            parse_image(None, name)
        assert (caught.value.code, caught.value.param) == ("invalid_type", name)
        return
    error = refused(model, LEAST[model] | {name: None})
    assert (error.code, error.param) == ("invalid_value", name)


def test_null_differs_from_absence_only_for_max_tokens_of_completions() -> None:
    told = {model.__name__: model.null_means_something for model in models()}
    assert {name for name, fields in told.items() if fields} == {"CompletionRequest"}


def test_null_in_stream_messages() -> None:
    nulls = dict.fromkeys(stream_messages.StreamStart.model_fields) | {"type": "start"}
    assert parse_start(json.dumps(nulls)) == parse_start('{"type": "start"}')
    with pytest.raises(ApiError) as caught:
        parse_control('{"type": "ack", "index": null}')
    assert (caught.value.code, caught.value.param) == ("invalid_message", "index")


@pytest.mark.parametrize(
    "item",
    [
        {"image": "aGk=", "url": None, "bytes": None, "video": None, "text": None},
        {"type": "image_url", "image_url": {"url": "aGk=", "detail": None}, "content": None},
        {"type": None, "image_url": {"url": "aGk="}, "fps": None},
        {"content": [{"image": "aGk=", "type": None}], "role": None},
    ],
)
def test_null_in_the_objects_of_an_input(item: Any) -> None:
    (reference,) = parse_input(item, max_items=1)
    assert (reference.kind, reference.text, reference.is_url) == ("image", "aGk=", False)


def test_a_wrong_role_is_told_before_the_fields_that_go_with_it() -> None:
    message = {"role": "tool", "content": "4", "tool_call_id": "call_1"}
    error = refused(ChatRequest, {"messages": [SAID, message]})
    assert (error.code, error.param) == ("invalid_value", "messages.1.role")
    assert "'assistant'" in str(error)


def test_a_byte_order_mark_before_a_stream_message() -> None:
    assert parse_start('\ufeff{"type": "start"}') == parse_start('{"type": "start"}')
    with pytest.raises(ApiError, match="a message is not valid JSON"):
        parse_control('{"type": "\ud800"}')


@pytest.mark.parametrize(
    ("item", "code", "name"),
    [
        (["aGk="], "invalid_type", "a list"),
        ([True], "invalid_type", "a list"),
        (True, "invalid_type", "true or false"),
        (1.5, "invalid_type", "a number"),
        ({"image": ["aGk="]}, "invalid_type", "a list"),
        (7, "unsupported_modality", "token ids"),
        ([7, 8], "unsupported_modality", "token ids"),
    ],
)
def test_errors_name_a_wrong_item_by_its_json_type(item: Any, code: str, name: str) -> None:
    with pytest.raises(ApiError, match=f"{name}$") as caught:
        parse_input([item], max_items=1)
    assert caught.value.code == code


@pytest.mark.parametrize(("one", "other"), [(4, None), (None, 4), (4, 4)])
def test_max_tokens_and_max_completion_tokens_are_one_limit(
    one: int | None, other: int | None
) -> None:
    body = {"messages": [SAID], "max_tokens": one, "max_completion_tokens": other}
    request = parse_body(json.dumps(body).encode(), ChatRequest)
    assert (request.max_completion_tokens or request.max_tokens) == 4


@pytest.mark.parametrize(
    ("model", "values", "param", "message"),
    [
        (CompletionRequest, {"stop": ["a"] * 17}, "stop", "at most 16"),
        (CreateSession, {"pin_prefix": 5}, "pin_prefix", "a valid string, or a valid list"),
        (CompletionRequest, {"stop": ["a", 5]}, "stop.1", "a valid string"),
        (CompletionRequest, {"prompt": True}, "prompt", "a valid string, or a valid list"),
        (
            CompletionRequest,
            {"prompt": [True]},
            "prompt.0",
            "a valid integer, or a valid string, or a valid list",
        ),
        (CompletionRequest, {"prompt": [1, 1.5]}, "prompt.1", "a valid integer"),
        (CompletionRequest, {"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
        (
            CompletionRequest,
            {"prompt": ["a", 1]},
            "prompt.0",
            "a valid integer; or prompt.1: Input should be a valid string",
        ),
        (CompletionRequest, {"prompt": [[1], ["a"]]}, "prompt.1.0", "a valid integer"),
        (CompletionRequest, {"stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
        (
            ChatRequest,
            {"messages": [SAID, {"role": "user", "content": 5}]},
            "messages.1.content",
            "a valid string, or a valid list",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
            "Input should be 'text'",
        ),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            "Field required",
        ),
        (ChatRequest, {"messages": ["hi"]}, "messages.0", "Input should be an object"),
    ],
)
def test_errors_explain_the_closest_form_of_a_union(
    model: type[RequestModel], values: Any, param: str, message: str
) -> None:
    error = refused(model, values)
    assert error.param == param
    assert message in error.message
    for internal in ("constrained", "list[", "TextPart", "tagged"):
        assert internal not in error.message


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        ("{", "invalid_json", None),
        ('{"type": "start", "fps": NaN}', "invalid_json", None),
        ("5", "invalid_message", None),
        ('{"type": "stop"}', "invalid_message", "type"),
        ('{"type": "start", "every": 0}', "invalid_message", "every"),
        ('{"type": "start", "evry": 1}', "unknown_field", "evry"),
    ],
)
def test_bad_start_messages(text: str, code: str, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        parse_start(text)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_bad_control_messages_name_the_field_alone() -> None:
    with pytest.raises(ApiError) as caught:
        parse_control('{"type": "ack", "index": -1}')
    assert (caught.value.code, caught.value.param) == ("invalid_message", "index")
    with pytest.raises(ApiError, match="'ack', 'end'"):
        parse_control('{"type": "stop"}')
