"""Two replicas of the language model on S3, beside the encoder, over real HTTP on a real Ray."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import rich.console
import s3fs

from helpers.lm import served as one_server
from helpers.lm.served import text_of
from helpers.lm.serving import events, same_text
from helpers.serve.embeddings import WIDTH, miss_killed_replicas_soon, png_uri, save_tiny_artifact
from helpers.serve.processes import replica_pids
from helpers.waiting import LIMIT_S, wait_until
from pipelines.chat import ChatClient, ChatConfig, chat

pytestmark = pytest.mark.ray

APP = f"lmcluster{os.getpid()}"
IMAGES_APP = f"images{APP}"
GREEDY = one_server.GREEDY | {"ignore_eos": True}
STREAM_BYTES = 10_000


@dataclass(frozen=True)
class Served:
    url: str
    fs: Any


@pytest.fixture(scope="module")
def served(
    serve_url: str,
    tiny_lm: Path,
    s3: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    from ray import serve as ray_serve

    from serve import app, lm_app
    from serve.embeddings.settings import ServeSettings
    from serve.lm.settings import LMSettings

    encoder = tmp_path_factory.mktemp("encoder") / "tiny"
    save_tiny_artifact(encoder)
    settings = LMSettings(
        model=str(tiny_lm),
        store="s3://lm-sessions/here",
        num_replicas=2,
        sessions=2,
        cache=32,
        threads=1,
        cpus=0.1,
        ingress_cpus=0.1,
        max_choices=2,
        max_reply_tokens=4_000,
        max_stream_bytes=STREAM_BYTES,
    )
    images = ServeSettings(artifact=str(encoder), threads=1, cpus=0.1, ingress_cpus=0.1)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in s3.items():
            patch.setenv(key, value)
        miss_killed_replicas_soon(patch, lm_app)
        fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        fs.mkdir("lm-sessions")
        beside = ray_serve.RunTarget(app.build_app(images), name=IMAGES_APP, route_prefix="/images")
        ray_serve.run_many([beside, ray_serve.RunTarget(lm_app.build_app(settings), name=APP)])
        yield Served(serve_url, fs)
        ray_serve.delete(APP)
        ray_serve.delete(IMAGES_APP)


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


complete = partial(one_server.complete, ignore_eos=True)


def status(http: httpx.Client, name: str) -> Any:
    return http.get(f"/v1/sessions/{name}").json()["status"]


def owners(served: Served, names: list[str]) -> dict[str, Any]:
    read = served.fs.cat_file
    return {name: json.loads(read(f"lm-sessions/here/{name}/owner.json")) for name in names}


def test_language_model_and_encoder_side_by_side(http: httpx.Client) -> None:
    embedded = http.post("/images/v1/embeddings", json={"input": png_uri(0)})
    assert len(embedded.json()["data"][0]["embedding"]) == WIDTH
    assert complete(http, prompt="ab", max_tokens=3)["usage"]["completion_tokens"] == 3
    models = [http.get(f"{root}/v1/models").json()["data"][0] for root in ("", "/images")]
    assert [model["modality"] for model in models] == ["text", "image"]


def some_of_each(served: Served, http: httpx.Client) -> list[str]:
    """Names of new sessions, two that one replica got and two that the other got."""
    by_replica: dict[str, list[str]] = {}
    for number in range(40):
        name = f"stay-{number}"
        http.post("/v1/sessions", json={"session_id": name})
        by_replica.setdefault(owners(served, [name])[name]["replica"], []).append(name)
        if sum(len(names) >= 2 for names in by_replica.values()) == 2:
            return [name for names in by_replica.values() for name in names[:2]]
    raise AssertionError(f"one replica has nothing to do: {by_replica}")


def test_sessions_stay_with_their_replica_and_survive_kill_9(
    served: Served, http: httpx.Client
) -> None:
    names = some_of_each(served, http)
    expected = {name: text_of(complete(http, prompt=name, max_tokens=48)) for name in names}
    got = {
        name: text_of(complete(http, prompt=name, max_tokens=8, session_id=name)) for name in names
    }
    first = owners(served, names)
    for _ in range(2):
        for name in names:
            got[name] += text_of(complete(http, max_tokens=8, session_id=name))
    assert {name: owner["replica"] for name, owner in owners(served, names).items()} == {
        name: owner["replica"] for name, owner in first.items()
    }

    # One of the two dies under readers; everybody's stream goes on, on S3's word alone.
    kept: dict[str, str] = {}

    def read(name: str) -> None:
        body = GREEDY | {"session_id": name, "max_tokens": 24, "stream": True}
        while True:
            with http.stream("POST", "/v1/completions", json=body) as reply:
                data = [d for _, d in events(reply.iter_lines()) if d != "[DONE]"]
            if reply.status_code != 429:  # one replica has slabs for half of the sessions
                break
            time.sleep(0.5)
        assert reply.status_code == 200
        assert not [d for d in data if "error" in d], data
        kept[name] = "".join(d["choices"][0]["text"] for d in data)

    # One more that runs until it is done is in the middle when the replica dies.
    readers = [threading.Thread(target=read, args=(name,)) for name in names]
    victim = replica_pids(APP, "LanguageModel")[0]
    for reader in readers[::2]:
        reader.start()
    time.sleep(0.1)
    os.kill(victim, signal.SIGKILL)
    for reader in readers[1::2]:
        reader.start()
    for reader in readers:
        reader.join(LIMIT_S)
    for name in names:
        assert same_text(got[name] + kept[name], expected[name])
    moved = {name for name, owner in owners(served, names).items()
             if owner["replica"] != first[name]["replica"]}  # fmt: skip
    assert moved
    assert moved != set(names)  # those of the other replica stayed


def test_clients_who_leave_while_slabs_change_hands(http: httpx.Client) -> None:
    """With more sessions than slabs every start waits for S3; some clients do not."""
    names = [f"leave-{number}" for number in range(5)]
    for name in names:
        complete(http, prompt=name, max_tokens=4, session_id=name)
    gone = 0
    for name in names:
        body = GREEDY | {"prompt": "x", "max_tokens": 400, "session_id": name, "stream": True}
        try:
            http.post("/v1/completions", json=body, timeout=0.08)
        except httpx.TimeoutException:
            gone += 1
    assert gone
    for name in names:
        go_on = GREEDY | {"max_tokens": 2, "session_id": name}

        def went_on(body: Any = go_on) -> bool:  # a start that was left behind may come first
            reply = http.post("/v1/completions", json=body)
            assert reply.status_code in (200, 409, 429), reply.text
            return reply.status_code == 200

        wait_until(went_on)
        before = http.get(f"/v1/sessions/{name}").json()
        assert before["status"] != "generating"
        reply = complete(http, max_tokens=2, session_id=name)
        assert reply["session"]["stream_position"] == before["stream_position"] + 2


def test_a_stream_ends_at_its_limit_of_bytes_and_is_resumed(http: httpx.Client) -> None:
    body = GREEDY | {"prompt": "on and on", "max_tokens": None, "session_id": "limit"}
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
        time.sleep(1)  # a reader who stalls: what Serve keeps for him is bounded
        sent = b"".join(reply.iter_bytes())
    assert STREAM_BYTES < len(sent) < STREAM_BYTES + 2_000
    data = list(events(iter(sent.decode().splitlines())))
    position, last = data[-2]
    assert last["choices"][0]["stop_reason"] == "max_stream_bytes"
    assert position is not None
    wait_until(lambda: status(http, "limit") != "generating")
    assert http.get("/v1/sessions/limit").json()["stream_position"] > position  # it was ahead
    text = "".join(d["choices"][0]["text"] for _, d in data[:-1])
    rest = complete(http, session_id="limit", resume_at=position, max_tokens=20)
    made = position - len("on and on") + 20
    # The replica that replaces the killed one may join the ring meanwhile; an answer does not move.
    whole = complete(http, prompt="on and on", max_tokens=made)
    assert same_text(text + text_of(rest), text_of(whole))


def test_a_stored_session_s_time_ends(served: Served, http: httpx.Client) -> None:
    http.post("/v1/sessions", json={"session_id": "brief", "ttl_s": 0.5})
    assert served.fs.exists("lm-sessions/here/brief/session.json")
    wait_until(lambda: http.get("/v1/sessions/brief").status_code == 404)
    wait_until(lambda: not served.fs.find("lm-sessions/here/brief"))
    assert http.post("/v1/sessions", json={"session_id": "brief"}).status_code == 201


class Typist(rich.console.Console):
    """A terminal whose user types some lines and leaves."""

    def __init__(self, *lines: str) -> None:
        super().__init__(file=io.StringIO(), width=200)
        self._lines = iter(lines)

    def input(self, *_: Any, **__: Any) -> str:
        try:
            return next(self._lines)
        except StopIteration:
            raise EOFError from None

    def said(self) -> str:
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue()


def test_chat_in_the_terminal(served: Served, http: httpx.Client) -> None:
    name = f"chat-{uuid.uuid4().hex[:6]}"
    cfg = ChatConfig(url=f"{served.url}/v1", session=name, system="Be kind.", temperature=0.0,
                     max_tokens=12)  # fmt: skip
    typist = Typist("hi", "/session", f"/fork {name}-2", "and?", "/help", "/quit")
    chat(cfg, typist)
    assert f"session {name} (new)" in typist.said()
    assert f"now in {name}-2" in typist.said()
    one, two = (http.get(f"/v1/sessions/{n}").json() for n in (name, f"{name}-2"))
    assert one["sinks"] == two["sinks"] > 4  # the system prompt is pinned
    assert two["stream_position"] > one["stream_position"] > one["sinks"]
    again = Typist("more", "/forget", "/quit")
    chat(cfg, again)
    assert f"session {name} (goes on)" in again.said()
    assert http.get(f"/v1/sessions/{name}").json()["answer_from"] == one["sinks"]  # made anew

    # The stream breaks off under it: it resumes where it was.
    with httpx.Client(base_url=f"{served.url}/v1", timeout=30) as plain:
        client = ChatClient(cfg, plain)
        client.begin()
        whole = "".join(client.say("tell me"))
        fork = ChatClient(ChatConfig(url=cfg.url, session=f"{name}-3", temperature=0.0,
                                     max_tokens=12, system="Be kind."), plain)  # fmt: skip
        fork.begin()
        real, broken = fork._stream, 0

        def breaks(body: dict[str, Any]) -> Iterator[tuple[int | None, str]]:
            nonlocal broken
            for number, piece in enumerate(real(body)):
                if not broken and number == 2:
                    broken += 1
                    raise httpx.ReadError("the line is dead")
                yield piece

        fork._stream = breaks  # type: ignore[method-assign]
        parts = "".join(fork.say("tell me"))
    assert broken
    assert parts.startswith(whole[: len(whole) // 2])
