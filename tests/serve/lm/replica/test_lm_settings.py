"""What settings do, and the errors that few requests meet, without Ray."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.lm.serving import MODEL, cluster, run, web
from helpers.waiting import eventually
from models.sink_lm.engine.generation import Generation
from serve.ingress.deployment import ingress_deployment
from serve.lm.settings import LMSettings
from serve.lm_app import LMIngress, model_deployment

GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "ignore_eos": True}


def test_replicas_and_limits_reach_serve() -> None:
    settings = LMSettings(
        model="m", store="s", num_replicas=3, ingress_replicas=2, max_requests=5, access_log=True
    )
    ingress, model = ingress_deployment(LMIngress, settings), model_deployment(settings)
    assert (ingress.num_replicas, model.num_replicas) == (2, 3)
    assert ingress.logging_config is not None
    assert ingress.logging_config["enable_access_log"] is True
    # Requests beyond ours still come in, for the typed refusal; a session's never go elsewhere.
    assert ingress.max_ongoing_requests > 5
    assert model.max_ongoing_requests >= 2 * 5
    quiet = ingress_deployment(LMIngress, LMSettings(model="m"))
    assert quiet.logging_config is not None
    assert (quiet.num_replicas, quiet.logging_config["enable_access_log"]) == (1, False)


def test_an_ingress_holds_so_many_requests_and_refuses_the_next(tiny_lm: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm, max_requests=1) as made, web(made) as http:
            real, entered, go = made.replica._scheduler.start, asyncio.Event(), asyncio.Event()

            async def waits(start: Any) -> Any:
                entered.set()
                await go.wait()
                return await real(start)

            made.replica._scheduler.start = waits  # type: ignore[method-assign]
            body = GREEDY | {"prompt": "ab", "max_tokens": 2}
            first = asyncio.ensure_future(http.post("/v1/completions", json=body))
            await entered.wait()
            for stream in (False, True):
                second = await http.post("/v1/completions", json=body | {"stream": stream})
                assert (second.status_code, second.headers["retry-after"]) == (429, "1")
                assert second.json()["error"]["code"] == "queue_full"
            go.set()
            assert (await first).status_code == 200
            streamed = await http.post("/v1/completions", json=body | {"stream": True})
            assert streamed.status_code == 200
            assert (await http.post("/v1/completions", json=body)).status_code == 200

    run(test())


@pytest.mark.parametrize("stream", [False, True])
def test_a_generation_that_fails_is_told(
    stream: bool, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Generation.accept

    def fails(self: Generation, choice: Any, position: int) -> None:
        if position == 5:
            raise RuntimeError("a bug")
        real(self, choice, position)

    monkeypatch.setattr(Generation, "accept", fails)

    async def test() -> None:
        async with cluster(tiny_lm) as made, web(made) as http:
            body = GREEDY | {"prompt": "ab", "max_tokens": 9, "stream": stream}
            reply = await http.post("/v1/completions", json=body)
            assert reply.status_code == (200 if stream else 500)
            last = reply.text.strip().rpartition("data: ")[2]
            error = json.loads(last)["error"]
            assert (error["code"], error["type"]) == ("generation_failed", "server_error")
            await eventually(lambda: not made.replica._engine.sessions())

    run(test())


def test_what_needs_a_store_is_refused_without_one(tiny_lm: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm) as made, web(made) as http:
            body = GREEDY | {"prompt": "ab", "max_tokens": 6, "session_id": "s"}
            assert (await http.post("/v1/completions", json=body)).status_code == 200
            resume = GREEDY | {"session_id": "s", "resume_at": 4, "max_tokens": 2}
            for route, sent, code in (
                ("sessions/s/snapshot", {}, "no_store"),
                ("sessions/s/restore", {}, "no_store"),
                ("completions", resume, "no_log"),
            ):
                reply = await http.post(f"/v1/{route}", json=sent)
                assert (reply.status_code, reply.json()["error"]["code"]) == (409, code)
                assert reply.headers["x-should-retry"] == "false"
            at_end = await http.post("/v1/completions", json=resume | {"resume_at": 8})
            assert at_end.status_code == 200

    run(test())


def test_another_model_s_session_is_refused(tiny_lm: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm, store=str(tmp_path)) as made, web(made) as http:
            body = GREEDY | {"prompt": "ab", "max_tokens": 6, "session_id": "s"}
            assert (await http.post("/v1/completions", json=body)).status_code == 200
            spec = tmp_path / "s" / "session.json"
            spec.write_text(json.dumps(json.loads(spec.read_text()) | {"fingerprint": "other"}))
            session = made.replica._sessions.get("s")
            assert session is not None
            await made.replica._sessions.drop(session)
            reply = await http.post("/v1/completions", json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (409, "other_model")
            assert "other" in reply.json()["error"]["message"]

    run(test())


def test_usage_so_far_comes_in_every_chunk_if_asked_for(tiny_lm: Path) -> None:
    async def chunks(http: Any, route: str, options: Any, **body: Any) -> list[Any]:
        sent = GREEDY | body | {"stream": True, "stream_options": options, "max_tokens": 6}
        reply = await http.post(f"/v1/{route}", json=sent)
        lines = [line for line in reply.text.splitlines() if line.startswith("data: {")]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    async def test() -> None:
        async with cluster(tiny_lm) as made, web(made) as http:
            both = {"include_usage": True, "continuous_usage_stats": True}
            for route, body in (
                ("completions", {"prompt": "ab"}),
                ("chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
            ):
                got = await chunks(http, route, both, **body)
                made_so_far = [chunk["usage"]["completion_tokens"] for chunk in got]
                assert made_so_far == sorted(made_so_far)
                assert made_so_far[-1] == 6
                assert got[-1]["choices"] == []
                assert all(
                    chunk["usage"]["total_tokens"]
                    == chunk["usage"]["prompt_tokens"] + chunk["usage"]["completion_tokens"]
                    for chunk in got
                )
                some = await chunks(http, route, {"include_usage": True}, **body)
                assert ["usage" in chunk for chunk in some] == [False] * (len(some) - 1) + [True]
                for options in (None, {}, {"continuous_usage_stats": True}):
                    none = await chunks(http, route, options, **body)
                    assert not any("usage" in chunk for chunk in none)

    run(test())
