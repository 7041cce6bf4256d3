"""The language model over real HTTP on a real Ray: one model replica, one ingress, a tiny model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from helpers.lm.bad_requests import BAD
from helpers.lm.served import (
    APP,
    GREEDY,
    CountsPings,
    Served,
    complete,
    complete_retrying,
    endless,
    serve_tiny_lm,
    text_of,
)
from helpers.lm.serving import MODEL, events, same_text
from helpers.serve.processes import replica_pids
from helpers.waiting import wait_until

pytestmark = pytest.mark.ray

EMOJI = "🎉"


@pytest.fixture(scope="module")
def served(
    serve_url: str, tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serve_tiny_lm(serve_url, tiny_lm, tmp_path_factory.mktemp("sessions")) as served:
        yield served


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)


def test_openai_client_completes_and_streams_the_same(client: openai.OpenAI) -> None:
    whole = client.completions.create(**GREEDY, prompt="Hello", max_tokens=40)
    chunks = list(
        client.completions.create(
            **GREEDY,
            prompt="Hello",
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 40)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 40
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    sixteen = client.completions.create(**GREEDY, prompt="Hello")
    assert sixteen.usage is not None
    assert sixteen.usage.completion_tokens == 16


def test_chat_streams_role_then_text_then_reason(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    options: Any = {**GREEDY, "messages": messages, "max_completion_tokens": 30, "seed": 1}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == (
        whole.choices[0].message.content
    )
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_logprobs_in_both_shapes(client: openai.OpenAI) -> None:
    completion = client.completions.create(**GREEDY, prompt="Hi", max_tokens=5, logprobs=3)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 5
    assert logprobs.token_logprobs[0] == max(logprobs.top_logprobs[0].values()) < 0
    chat = client.chat.completions.create(
        **GREEDY,
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=5,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs.content if chat.choices[0].logprobs else None
    assert content is not None
    assert len(content) == 5
    assert len(content[0].top_logprobs) == 2
    assert content[0].logprob == content[0].top_logprobs[0].logprob
    assert content[0].bytes is not None


def test_n_answers_and_lists_of_prompts(http: httpx.Client) -> None:
    alone = [text_of(complete(http, prompt=prompt, max_tokens=8)) for prompt in ("ab", "xyz")]
    both = complete(http, prompt=["ab", "xyz"], max_tokens=8)
    assert [choice["text"] for choice in both["choices"]] == alone
    three = complete(http, prompt="ab", n=3, max_tokens=8)
    assert [choice["text"] for choice in three["choices"]] == [alone[0]] * 3
    varied = complete(http, prompt="ab", n=3, max_tokens=8, temperature=1.5, seed=7)
    assert len({choice["text"] for choice in varied["choices"]}) > 1
    assert varied["usage"]["completion_tokens"] == 24
    ids = complete(http, prompt=[[97, 98]], max_tokens=8)  # ids are taken as they are
    assert ids["usage"]["prompt_tokens"] == 2


def test_a_session_gets_only_what_is_new(http: httpx.Client) -> None:
    name = "only-new"
    first = complete(http, prompt="Once upon", max_tokens=10, session_id=name)
    assert first["session"] == {
        "id": name,
        "stream_position": 19,
        "cached_tokens": 19,
        "evicted_tokens": 0,
    }
    headers = {"X-Session-ID": name}
    reply = http.post(
        "/v1/completions",
        json=GREEDY | {"prompt": " a time", "max_tokens": 10},
        headers=headers,
    )
    second = reply.json()
    assert second["session"]["stream_position"] == 36
    assert second["session"]["evicted_tokens"] == 36 - 31
    assert second["usage"]["prompt_tokens"] == 7
    # The same stream in one piece: prompt, first answer, second prompt.
    stream = http.post("/v1/tokenize", json={"prompt": "Once upon"}).json()["tokens"]
    logged = http.get(f"/v1/sessions/{name}").json()
    assert logged["stream_position"] == 36
    assert logged["answer_from"] == 26
    assert len(stream) == 9
    # Going on without a prompt equals one longer answer.
    split = complete(http, prompt="Going", max_tokens=12, session_id="split")
    rest = complete(http, max_tokens=12, session_id="split")
    whole = complete(http, prompt="Going", max_tokens=24)
    assert same_text(text_of(split) + text_of(rest), text_of(whole))


def test_chat_turns_follow_through_the_template(http: httpx.Client) -> None:
    def turn(text: str, **more: Any) -> Any:
        body = GREEDY | {"messages": [{"role": "user", "content": text}], "max_tokens": 6} | more
        return http.post("/v1/chat/completions", json=body).json()

    whole = http.post("/v1/tokenize", json={"messages": [{"role": "user", "content": "hi"}]})
    first = turn("hi", session_id="turns")
    assert first["usage"]["prompt_tokens"] == whole.json()["count"]
    second = turn("and?", session_id="turns")
    # <|im_end|>\n (the answer was cut) <|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n
    expected = 2 + len("user\n") + 1 + len("and?") + 2 + 1 + len("assistant\n")
    assert second["usage"]["prompt_tokens"] == expected
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_sessions_are_made_forked_listed_and_deleted(http: httpx.Client) -> None:
    pinned = http.post(
        "/v1/sessions",
        json={"session_id": "pinned", "pin_prefix": "Be brief. ", "ttl_s": 600},
    )
    assert pinned.status_code == 201
    assert pinned.json()["sinks"] == pinned.json()["stream_position"] == 10
    assert http.post("/v1/sessions", json={"session_id": "pinned"}).status_code == 409
    said = complete(http, prompt="Why?", max_tokens=50, session_id="pinned")
    assert said["session"]["evicted_tokens"] > 0
    fork = http.post("/v1/sessions/pinned/fork", json={"session_id": "twin"})
    assert fork.status_code == 201
    assert fork.json()["stream_position"] == said["session"]["stream_position"]
    snapshot = http.post("/v1/sessions/pinned/snapshot").json()
    assert snapshot["snapshot_position"] == snapshot["stream_position"]
    restored = http.post("/v1/sessions/pinned/restore").json()
    assert restored["owner_epoch"] == snapshot["owner_epoch"] + 1
    one = complete(http, prompt="Go on", max_tokens=20, session_id="pinned")
    other = complete(http, prompt="Go on", max_tokens=20, session_id="twin")
    assert text_of(one) == text_of(other)
    names = {entry["id"] for entry in http.get("/v1/sessions").json()["data"]}
    assert {"pinned", "twin"} <= names
    assert http.delete("/v1/sessions/twin").json()["deleted"]
    assert http.get("/v1/sessions/twin").status_code == 404
    created = http.post("/v1/sessions", json={"ttl_s": 0.1}).json()
    wait_until(lambda: http.get(f"/v1/sessions/{created['id']}").status_code == 404)


def test_more_sessions_than_slabs_and_one_stream_each(http: httpx.Client) -> None:
    """Eight sessions on three slabs: the idle ones make room."""
    prompts = [f"story {number}" for number in range(8)]
    options = {"ignore_eos": True}
    expected = [
        text_of(complete(http, prompt=prompt, max_tokens=30, **options)) for prompt in prompts
    ]
    got = [""] * len(prompts)
    for piece in range(3):
        for number, prompt in enumerate(prompts):
            body = options | ({"prompt": prompt} if piece == 0 else {})
            reply = complete(http, max_tokens=10, session_id=f"swap-{number}", **body)
            got[number] += text_of(reply)
    assert all(map(same_text, got, expected))


def test_a_stop_string_across_tokens_stops(http: httpx.Client) -> None:
    text = text_of(complete(http, prompt="stop here", max_tokens=40))
    stop = text[11:15]
    assert len(stop.encode()) > 2  # every token is one byte
    cut = complete(http, prompt="stop here", max_tokens=40, stop=["never that", stop])
    assert text_of(cut) == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["choices"][0]["stop_reason"] == stop
    body = GREEDY | {"prompt": "stop here", "max_tokens": 40, "stop": stop, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as reply:
        data = [d for _, d in events(reply.iter_lines())]
    assert "".join(d["choices"][0]["text"] for d in data[:-1]) == text[: text.index(stop)]


def test_characters_are_never_broken(http: httpx.Client, client: openai.OpenAI) -> None:
    """The model is made to repeat an emoji, whose four bytes are four tokens."""
    ids = client.post("/tokenize", cast_to=httpx.Response, body={"prompt": EMOJI}).json()["tokens"]
    assert len(ids) == 4
    bias = {str(token): 100 for token in ids}
    body: Any = {
        "prompt": EMOJI,
        "max_tokens": 60,
        "logit_bias": bias,
        "temperature": 1.0,
        "seed": 5,
        "stream": True,
        "session_id": "emoji",
    }
    with http.stream("POST", "/v1/completions", json=body) as reply:
        texts = [d["choices"][0]["text"] for _, d in events(reply.iter_lines()) if d != "[DONE]"]
    for text in texts:  # whole characters, or bytes that can never become one
        assert set(text) <= {EMOJI, "\ufffd"}, text
    # A character that begins in one request and ends in the next is shown whole by the latter.
    first = complete(http, prompt=ids[:2], max_tokens=1, logit_bias={str(ids[2]): 100},
                     session_id="half")  # fmt: skip
    second = complete(http, max_tokens=1, logit_bias={str(ids[3]): 100}, session_id="half")
    assert (text_of(first), text_of(second)) == ("", EMOJI)


@pytest.mark.parametrize(
    ("route", "body", "status", "code", "param"),
    [case[1:] for case in BAD],
    ids=[case[0] for case in BAD],
)
def test_malformed_requests(
    http: httpx.Client, route: str, body: Any, status: int, code: str, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    reply = http.post(f"/v1/{route}", content=content, headers=headers)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert error["message"]
    if param is not None:
        assert error["param"] == param


def test_busy_cancel_and_no_free_slab(http: httpx.Client, client: openai.OpenAI) -> None:
    with endless(http, "busy") as reply:
        lines = reply.iter_lines()  # kept: dropping the iterator would disconnect
        next(lines)
        again = http.post("/v1/completions", json={"prompt": "me too", "session_id": "busy"})
        assert again.status_code == 409
        assert again.json()["error"]["code"] == "session_busy"
        assert again.headers["x-should-retry"] == "false"
    wait_until(lambda: http.get("/v1/sessions/busy").json()["status"] != "generating")
    position = http.get("/v1/sessions/busy").json()["stream_position"]
    assert complete(http, max_tokens=3, session_id="busy")["session"]["stream_position"] == (
        position + 3
    )
    stream = client.completions.create(
        **GREEDY, prompt="x", max_tokens=None, stream=True, extra_body={"session_id": "busy"}
    )
    next(iter(stream))
    stream.close()  # cancels the generation, not the session
    wait_until(lambda: http.get("/v1/sessions/busy").json()["status"] != "generating")

    streams = [endless(http, f"full-{number}") for number in range(6)]
    refused = []
    try:
        for stream in streams:
            reply = stream.__enter__()
            if reply.status_code == 429:
                reply.read()
                refused.append(reply)
        for number in range(6, 20):
            if not refused:
                reply = http.post(
                    "/v1/completions", json={"prompt": "x", "session_id": f"full-{number}"}
                )
                refused += [reply] if reply.status_code == 429 else []
        assert refused
        assert refused[0].headers["retry-after"] == "1"
        assert refused[0].json()["error"]["code"] == "no_free_slab"
        assert refused[0].json()["error"]["type"] == "rate_limit_error"
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)

    def is_quiet() -> bool:
        entries = http.get("/v1/sessions").json()["data"]
        return all(entry["status"] != "generating" for entry in entries)

    wait_until(is_quiet)


def test_kill_9_mid_stream_loses_and_repeats_nothing(served: Served, http: httpx.Client) -> None:
    """The replica dies twice: once under a reader who stays, once under one who comes back."""
    expected = text_of(complete(http, prompt="and then", max_tokens=400, ignore_eos=True))
    # The ingress goes on with another replica by itself: the official client sees a pause, and
    # reads over the comments in it.
    counts = CountsPings()
    official = openai.OpenAI(
        base_url=f"{served.url}/v1",
        api_key="unused",
        max_retries=0,
        http_client=httpx.Client(transport=counts, timeout=60),
    )
    got, killed = "", False
    for chunk in official.completions.create(
        **GREEDY,
        prompt="and then",
        max_tokens=400,
        stream=True,
        extra_body={"session_id": "survivor", "ignore_eos": True},
    ):
        got += chunk.choices[0].text
        if len(got) > 60 and not killed:
            killed = True
            for pid in replica_pids(APP, "LanguageModel"):
                os.kill(pid, signal.SIGKILL)
    assert killed
    assert same_text(got, expected)
    assert counts.pings >= 3

    # The client's connection breaks as well: it resumes at the last position it has seen.
    wait_until(lambda: http.get("/healthz").status_code == 200)
    got, position = "", None
    with endless(http, "resumer", max_tokens=400) as reply:
        for seen, data in events(reply.iter_lines()):
            got, position = got + data["choices"][0]["text"], seen or position
            if len(got) > 60:
                break
        for pid in replica_pids(APP, "LanguageModel"):
            os.kill(pid, signal.SIGKILL)
    rest = complete_retrying(http, session_id="resumer", resume_at=position, max_tokens=300)
    assert (got + text_of(rest))[: len(expected)] == expected[: len(got + text_of(rest))]
    assert len(text_of(rest)) > 100


def test_resume_is_checked(http: httpx.Client) -> None:
    complete(http, prompt="12345", max_tokens=5, session_id="check")
    beyond = http.post("/v1/completions", json={"session_id": "check", "resume_at": 99})
    assert (beyond.status_code, beyond.json()["error"]["param"]) == (400, "resume_at")
    inside = http.post("/v1/completions", json={"session_id": "check", "resume_at": 2})
    assert (inside.status_code, inside.json()["error"]["code"]) == (409, "resume_in_prompt")


def test_tokenize_models_and_health(http: httpx.Client) -> None:
    tokens = http.post("/v1/tokenize", json={"prompt": "a🎉", "return_token_strs": True}).json()
    assert tokens["count"] == 5
    back = http.post("/v1/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back == {"prompt": "a🎉"}
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["capacity"], model["sessions"]) == (MODEL, 32, 3)
    assert http.get("/v1/models/other").status_code == 404
    assert http.get("/healthz").text == "ok"
    assert "rayjepa_generated_tokens_total" in http.get("/metrics").text
