"""Bodies of requests to generate: fields of other servers, limits of numbers, stop strings."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.ingress.bodies import parse_body
from serve.ingress.errors import ApiError
from serve.lm.frontend.schemas import ChatRequest, CompletionRequest, Message

MESSAGES = [{"role": "user", "content": "hi"}]


def completion(**fields: Any) -> CompletionRequest:
    return parse_body(json.dumps({"prompt": "a"} | fields).encode(), CompletionRequest)


def chat(**fields: Any) -> ChatRequest:
    return parse_body(json.dumps({"messages": MESSAGES} | fields).encode(), ChatRequest)


NEUTRAL: list[dict[str, Any]] = [
    {"best_of": 1},
    {"best_of": 3, "n": 3},
    {"suffix": ""},
    {"suffix": None},
    {"tools": []},
    {"tools": [], "tool_choice": "none", "parallel_tool_calls": True},
    {"tool_choice": "auto"},
    {"functions": [], "function_call": "none"},
    {"response_format": {"type": "text"}},
    {"store": False, "metadata": {}},
    {"metadata": {"run": "7"}},
    {"service_tier": "auto"},
    {"service_tier": "default"},
    {"modalities": ["text"], "audio": None, "prediction": None},
    {"user": "someone", "safety_identifier": "x", "prompt_cache_key": "y"},
    {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "n": 1},
    {"repetition_penalty": 1.0, "length_penalty": 1, "typical_p": 1.0, "mirostat": 0},
    {"use_beam_search": False, "skip_special_tokens": True, "min_p": 0.0, "top_k": -1},
    {"guided_json": None, "truncate_prompt_tokens": None, "cache_prompt": True},
    {"stream_options": None},
    {"stream_options": {"include_usage": False, "include_obfuscation": False}},
    {
        "stream": True,
        "stream_options": {
            "include_usage": True,
            "continuous_usage_stats": True,
            "include_obfuscation": True,
        },
    },
    {"stop": ""},
    {"stop": []},
    {"stop": ["", ""]},
]


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize("fields", NEUTRAL, ids=json.dumps)
def test_neutral_fields_change_nothing(make: Any, fields: dict[str, Any]) -> None:
    plain = {name: value for name, value in fields.items() if name in ("n", "stream", "user")}
    drop = {"stream_options"}
    assert make(**fields).model_dump(exclude=drop) == make(**plain).model_dump(exclude=drop)


CHANGING: list[dict[str, Any]] = [
    {"best_of": 2},
    {"best_of": True},
    {"best_of": 3, "n": 2},
    {"suffix": "end"},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}},
    {"response_format": {"type": "json_object"}},
    {"store": True},
    {"service_tier": "flex"},
    {"modalities": ["text", "audio"]},
    {"reasoning_effort": "high"},
    {"repetition_penalty": 1.1},
    {"typical_p": True},
    {"use_beam_search": True},
    {"guided_json": {}},
    {"max_token": 3},
]


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize("fields", CHANGING, ids=json.dumps)
def test_what_would_change_the_answer_is_refused_by_name(make: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        make(**fields)
    assert (caught.value.status, caught.value.code) == (400, "unknown_field")
    assert caught.value.param == next(iter(fields))


ECHOED: list[dict[str, Any]] = [
    {"annotations": []},
    {"annotations": [{"type": "url_citation"}]},
    {"reasoning_content": "hm", "reasoning": "hm"},
    {"cache_control": {"type": "ephemeral"}},
    {"name": "me"},
    {"refusal": None, "audio": None, "function_call": None, "tool_calls": None},
    {"refusal": "", "tool_calls": [], "provider_specific_fields": {"a": 1}},
    {"thinking_blocks": [], "images": []},
    {"content": [{"type": "text", "text": "hi", "cache_control": {}, "annotations": []}]},
]


@pytest.mark.parametrize("fields", ECHOED, ids=json.dumps)
@pytest.mark.parametrize("role", ["assistant", "user"])
def test_messages_of_earlier_replies_are_accepted(role: str, fields: dict[str, Any]) -> None:
    sent = {"role": role, "content": "hi"} | fields
    (message,) = chat(messages=[sent]).messages
    assert message.plain() == {"role": role, "content": "hi"}


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_calls": [{"id": "1"}]},
        {"refusal": "no"},
        {"audio": {"id": "a"}},
        {"contents": "x"},
        {"content": [{"type": "text", "text": "x", "txt": "y"}]},
    ],
    ids=json.dumps,
)
def test_other_fields_of_messages_are_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        chat(messages=[{"role": "assistant", "content": "hi"} | fields])
    assert caught.value.code == "unknown_field"
    assert caught.value.param is not None
    assert caught.value.param.startswith("messages.0.")


def test_numbers_at_their_edges() -> None:
    assert [completion(seed=seed).seed for seed in (-1, -2, 0, 2**63 - 1, -(2**63))] == [
        None,
        -2,
        0,
        2**63 - 1,
        -(2**63),
    ]
    assert completion(top_p=0).top_p == 0
    assert [completion(top_k=top_k).top_k for top_k in (-1, 0, 5)] == [0, 0, 5]
    for field, value in (("seed", 2**63), ("seed", -(2**63) - 1), ("top_k", -2), ("top_p", -0.1)):
        with pytest.raises(ApiError) as caught:
            completion(**{field: value})
        assert caught.value.param == field


def test_stops_are_one_string_or_up_to_16() -> None:
    assert completion(stop="a").stop == ["a"]
    many = [f"stop {number}" for number in range(16)]
    assert completion(stop=many).stop == many
    with pytest.raises(ApiError, match="at most 16") as caught:
        completion(stop=[*many, "one more"])
    assert caught.value.param == "stop"
    with pytest.raises(ApiError, match="256"):
        completion(stop="x" * 257)
    with pytest.raises(ApiError, match=r"stop.*string"):
        completion(stop=[1])


@pytest.mark.parametrize("key", ["1" * 5_000, "-1", "1.5", "", "٣", "a"])
def test_keys_of_logit_bias_are_token_ids(key: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(logit_bias={key: 1})
    assert (caught.value.status, caught.value.param) == (400, "logit_bias")
    assert len(caught.value.message) < 100


def test_include_usage_needs_stream() -> None:
    with pytest.raises(ApiError) as caught:
        completion(stream_options={"include_usage": True})
    assert caught.value.param == "stream_options"


def test_the_description_of_the_api_says_what_a_stop_may_be() -> None:
    (stop,) = [CompletionRequest.model_json_schema()["properties"]["stop"]]
    assert {form["type"] for form in stop["anyOf"]} == {"string", "array"}
    assert "annotations" not in Message.model_json_schema()["properties"]
