"""What all applications do besides their own routes: health, API key, CORS, limits of bodies."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from starlette.routing import Route

from helpers.serve.ingress import NAMES, POSTS, Made, Reply, ask, make
from helpers.waiting import LIMIT_S
from serve.embeddings.settings import ServeSettings
from serve.ingress.deployment import read_api_key

EVERY = pytest.mark.parametrize("name", NAMES)
PAGE = "https://app.example.org"


def get(made: Made, method: str, path: str, **more: Any) -> Reply:
    return asyncio.run(asyncio.wait_for(ask(made.app, method, path, **more), LIMIT_S))


async def settle() -> None:
    """Lets every task come to where it waits."""
    for _ in range(50):
        await asyncio.sleep(0)


def routes(made: Made) -> dict[str, set[str]]:
    """Methods by path, path parameters filled in."""
    found: dict[str, set[str]] = {}
    for route in made.app.routes:
        if isinstance(route, Route):
            path = route.path.replace("{name:path}", "tiny").replace("{session_id}", "s")
            found.setdefault(path, set()).update(route.methods or ())
    return found


@EVERY
def test_head_works_wherever_get_does(name: str) -> None:
    made = make(name)
    paths = [path for path, methods in routes(made).items() if "GET" in methods]
    assert {"/healthz", "/health", "/metrics", "/v1/models", "/v1/models/tiny"} <= set(paths)
    for path in paths:
        if path.startswith("/v1/sessions"):
            continue  # these ask a replica
        whole, head = get(made, "GET", path), get(made, "HEAD", path)
        assert (head.status, head.headers) == (whole.status, whole.headers), path
        assert head.status == 200
        assert int(head.headers["content-length"]) == len(whole.body) > 0
        assert head.body == b""
    assert get(made, "HEAD", "/v1/none").status == 404
    assert get(made, "HEAD", POSTS[name]).status == 405


@EVERY
def test_options_names_every_method_and_asks_for_no_key(name: str) -> None:
    made = make(name, api_key="k")
    for path, methods in routes(made).items():
        reply = get(made, "OPTIONS", path)
        expected = methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
        assert (reply.status, reply.body) == (204, b"")
        assert set(reply.headers["allow"].split(", ")) == expected
    for path in ("/", "*"):  # what HAProxy asks unless told otherwise, and the whole server
        assert get(made, "OPTIONS", path).status == 204
    assert get(made, "OPTIONS", "/v1/none").error["code"] == "route_not_found"
    assert get(made, "GET", "/v1/models").status == 401


def test_a_405_names_the_methods_of_all_routes_of_a_path() -> None:
    reply = get(make("language"), "PUT", "/v1/sessions/s")
    assert (reply.status, reply.error["code"]) == (405, "method_not_allowed")
    assert reply.headers["allow"] == "DELETE, GET, HEAD, OPTIONS"


@EVERY
def test_both_paths_of_the_health_check_and_slashes_at_the_end(name: str) -> None:
    made = make(name, api_key="k")
    for path in ("/healthz", "/health", "/healthz/", "/health/"):
        reply = get(made, "GET", path)
        assert (reply.status, reply.body) == (200, b"ok")
    key = {"authorization": "Bearer k"}
    assert get(made, "GET", "/v1/models/", headers=key).status == 200
    assert get(made, "GET", "/v1/models/tiny/", headers=key).status == 200
    reply = get(made, "POST", POSTS[name] + "/", headers=key, pieces=[b"{"])
    assert reply.error["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer k-1", 200),
        ("bearer   k-1", 200),
        ("BEARER\tk-1 ", 200),
        ("Bearer k-1 k-1", 401),
        ("Bearer k", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("", 401),
        ("k-1", 401),
        ("Basic k-1", 401),
        ("Bearer \xe9", 401),
    ],
)
def test_forms_of_the_authorization_header(header: str, status: int) -> None:
    made = make("language", api_key="k-1")
    assert get(made, "GET", "/v1/models", headers={"authorization": header}).status == status


@EVERY
def test_pages_of_an_allowed_origin_get_cors_headers(name: str) -> None:
    made = make(name, api_key="k", cors_origins=(PAGE,))
    preflight = {
        "origin": PAGE,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    reply = get(made, "OPTIONS", POSTS[name], headers=preflight)
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert "x-stainless-lang" in reply.headers["access-control-allow-headers"]
    assert {"GET", "POST", "DELETE"} <= set(
        reply.headers["access-control-allow-methods"].split(", ")
    )
    origin, key = {"origin": PAGE}, {"authorization": "Bearer k"}
    errors = [
        get(made, "POST", POSTS[name], headers=origin),
        get(made, "GET", "/v1/none", headers=origin | key),
        get(made, "POST", POSTS[name], headers=origin | key, pieces=[b"{"]),
        get(made, "POST", POSTS[name], headers=origin | key | {"content-type": "a/b"}),
    ]
    assert [error.status for error in errors] == [401, 404, 400, 415]
    for error in errors:
        assert error.headers["access-control-allow-origin"] == PAGE
        assert "retry-after" in error.headers["access-control-expose-headers"]
    other = {"origin": "https://evil.example.org"}
    assert "access-control-allow-origin" not in get(made, "GET", "/health", headers=other).headers
    plain = get(make(name), "OPTIONS", POSTS[name], headers=preflight)
    assert plain.status == 204
    assert not any(header.startswith("access-control") for header in plain.headers)


def test_an_unexpected_error_carries_the_headers_for_browsers_too() -> None:
    made = make("language", cors_origins=("*",))

    @made.app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("secret")

    async def run() -> Reply:
        replies: list[Reply] = []
        with pytest.raises(RuntimeError, match="secret"):  # for Serve's log
            await ask(made.app, "GET", "/broken", headers={"origin": PAGE}, into=replies)
        return replies[0]

    reply = asyncio.run(run())
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert reply.headers["access-control-allow-origin"] == "*"
    assert b"secret" not in reply.body
    assert made.count("/broken", 500) == 1


@EVERY
def test_half_a_body_is_a_408(name: str) -> None:
    made = make(name, body_timeout_s=0.05)
    reply = get(made, "POST", POSTS[name], pieces=[b"{"], then="stall")
    assert (reply.status, reply.error["code"]) == (408, "body_timeout")
    assert reply.headers["connection"] == "close"
    assert made.count(POSTS[name], 408) == 1
    reply = get(made, "POST", POSTS[name], pieces=[], then="stall")
    assert reply.status == 408


@EVERY
def test_a_long_body_is_a_413_whether_it_says_so_or_not(name: str) -> None:
    image = {"max_image_bytes": 100} if name != "language" else {}
    made, path = make(name, max_request_bytes=100, **image), POSTS[name]
    told = {"content-length": "101"}
    replies = [
        get(made, "POST", path, headers=told, pieces=[], then="stall"),  # refused unread
        get(made, "POST", path, pieces=[b" " * 60, b" " * 60], then="stall"),
    ]
    for reply in replies:
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")
        assert reply.error["message"] == "the body has more than 100 bytes"
    assert get(made, "POST", path, pieces=[b" " * 100]).error["code"] == "invalid_json"
    assert get(made, "POST", path, headers=told | {"content-type": "a/b"}).status == 415
    assert get(made, "POST", "/v1/none", headers=told).status == 404


@EVERY
def test_half_sent_bodies_keep_nobody_out(name: str) -> None:
    limits = {
        "embeddings": {"max_queued": 4, "max_items": 4},
        "language": {"max_requests": 4},
        "planning": {"max_queued": 4},
    }
    made = make(name, **limits[name])
    path = POSTS[name]

    async def run() -> list[Reply]:
        halves = [
            asyncio.create_task(ask(made.app, "POST", path, pieces=[b"{"], then="stall"))
            for _ in range(600)
        ]
        await settle()
        replies = [
            await ask(made.app, "GET", "/healthz"),
            await ask(made.app, "GET", "/metrics"),
            await ask(made.app, "GET", "/v1/models"),
            await ask(made.app, "POST", path, pieces=[b"[]"]),
        ]
        for half in halves:
            half.cancel()
        await asyncio.gather(*halves, return_exceptions=True)
        return replies

    assert [reply.status for reply in asyncio.run(run())] == [200, 200, 200, 400]


@pytest.mark.parametrize("then", ["leave", "cancel"])
@EVERY
def test_a_client_who_leaves_amid_its_body_is_a_499(name: str, then: str) -> None:
    made = make(name)
    reply = get(made, "POST", POSTS[name], pieces=[b"{"], then=then)  # raises nothing
    assert reply.status == 0
    assert made.count(POSTS[name], 499) == 1
    assert made.count(POSTS[name], 500) == 0


@EVERY
def test_bodies_that_arrive_have_a_common_limit(name: str) -> None:
    sizes = {"max_request_bytes": 100, "max_arriving_bytes": 150}
    made = make(name, **(sizes | ({"max_image_bytes": 100} if name != "language" else {})))
    path = POSTS[name]

    async def run() -> tuple[Reply, list[Reply]]:
        half = asyncio.create_task(ask(made.app, "POST", path, pieces=[b" " * 90], then="stall"))
        await settle()
        refused = await ask(made.app, "POST", path, pieces=[b" " * 90])
        half.cancel()
        await asyncio.gather(half, return_exceptions=True)
        return refused, [await ask(made.app, "POST", path, pieces=[b" " * 90]) for _ in range(3)]

    refused, fits = asyncio.run(run())
    assert (refused.status, refused.error["code"]) == (429, "queue_full")
    assert refused.error["type"] == "rate_limit_error"
    assert refused.headers["retry-after"] == "1"
    for reply in fits:  # the room is free again
        assert reply.error["code"] == "invalid_json"
    whole = get(make(name), "POST", path, pieces=[b" " * 90] * 20)
    assert whole.error["code"] == "invalid_json"


def test_requests_with_a_whole_body_count_until_they_are_answered() -> None:
    made = make("language", max_requests=2)
    release = asyncio.Event()

    async def run() -> list[Reply]:
        async def held(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"done"})

        made.app.mount("/held", held)
        two = [asyncio.create_task(ask(made.app, "POST", "/held/x")) for _ in range(2)]
        await settle()
        third = await ask(made.app, "POST", "/v1/completions", pieces=[b"{}"])
        probe = await ask(made.app, "GET", "/healthz")
        release.set()
        done = await asyncio.gather(*two)
        after = await ask(made.app, "POST", "/v1/completions", pieces=[b"["])
        return [third, probe, *done, after]

    third, probe, *done, after = asyncio.run(run())
    assert (third.status, third.error["code"]) == (429, "queue_full")
    assert third.headers["retry-after"] == "1"
    assert probe.status == 200
    assert [reply.body for reply in done] == [b"done", b"done"]
    assert after.error["code"] == "invalid_json"


@pytest.mark.parametrize("value", ["sk-test", "sk-test\n", " sk-test\r\n", "sk-test\t"])
def test_white_space_around_a_key_is_not_part_of_it(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYJEPA_TEST_KEY", value)
    key = read_api_key(ServeSettings(artifact="a", api_key_env=" RAYJEPA_TEST_KEY\n"))
    made = make("embeddings", api_key=key)
    headers = {"authorization": "Bearer sk-test"}
    assert get(made, "GET", "/v1/models", headers=headers).status == 200
    assert read_api_key(ServeSettings(artifact="a")) is None


def test_a_steady_body_has_time_and_a_dripping_one_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same moments on a clock of our own."""
    from serve.ingress import request_limits

    now = 100.0
    monkeypatch.setattr(
        request_limits, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now)})
    )
    reader = request_limits.RequestLimits(
        ServeSettings(artifact="a", body_timeout_s=10), max_requests=1
    )
    assert reader.deadline(started=100.0, received=0) == 110  # nothing yet
    now = 160.0
    assert reader.deadline(started=100.0, received=120 * 1024) == 170  # 2 kB a second: may go on
    assert reader.deadline(started=100.0, received=60) == pytest.approx(110, abs=0.1)  # overdue
    assert reader.deadline(started=100.0, received=2**30) == 170  # much came, then nothing


@EVERY
def test_openapi_has_every_schema_that_it_refers_to(name: str) -> None:
    """Generators of clients and testers follow every reference."""
    described = json.loads(get(make(name), "GET", "/openapi.json").body)
    bodies = {
        path: operation["requestBody"]
        for path, methods in described["paths"].items()
        for operation in methods.values()
        if "requestBody" in operation
    }
    assert POSTS[name] in bodies
    schemas = described["components"]["schemas"]
    references = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(described)))
    assert references == {f"#/components/schemas/{schema}" for schema in schemas}
    optional = {path for path, body in bodies.items() if not body.get("required")}
    assert optional == ({"/v1/sessions/{session_id}/fork"} if name == "language" else set())
    if name == "language":
        content = bodies["/v1/chat/completions"]["content"]["application/json"]
        assert content["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
        assert schemas["ChatRequest"]["properties"]["messages"]["items"] == {
            "$ref": "#/components/schemas/Message"
        }
        assert schemas["Message"]["required"] == ["role", "content"]


def test_requests_are_named_in_errors_as_json() -> None:
    reply = get(make("embeddings"), "PATCH", "/v1/models")
    assert json.loads(reply.body)["error"]["message"] == "Method Not Allowed: PATCH /v1/models"
