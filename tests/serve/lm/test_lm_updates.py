"""An update of the language model under load, over real HTTP on a real Ray."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.lm.serving import events, save_tiny_lm
from helpers.serve.embeddings import miss_killed_replicas_soon
from helpers.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.ray

APP = f"lmupdates{os.getpid()}"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
PROMPTS = ("one", "two words", "three little words")
MADE, LONG = 12, 1_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    folders = {name: root / name for name in ("old", "new")}
    for folder in folders.values():
        folder.mkdir()
    save_tiny_lm(folders["old"])
    save_tiny_lm(folders["new"], seed=5, more=["<|more|>"])  # a byte is another token there
    return folders


@pytest.fixture(scope="module")
def http(serve_url: str) -> Iterator[httpx.Client]:
    from ray import serve as ray_serve

    from serve import lm_app

    with pytest.MonkeyPatch.context() as patch:
        miss_killed_replicas_soon(patch, lm_app)
        with httpx.Client(base_url=serve_url, timeout=60) as client:
            yield client
        ray_serve.delete(APP)


def deploy(model: Path, store: Path) -> None:
    from ray import serve as ray_serve

    from serve import lm_app
    from serve.lm.settings import LMSettings

    settings = LMSettings(
        model=str(model),
        store=str(store),
        num_replicas=2,
        sessions=4,
        cache=32,
        threads=1,
        cpus=0.1,
        ingress_cpus=0.1,
        max_choices=2,
        max_reply_tokens=4_000,
        drain_s=300,  # a slow machine takes long for the answers
    )
    ray_serve.run(lm_app.build_app(settings), name=APP)


def complete(http: httpx.Client, **body: Any) -> httpx.Response:
    return http.post("/v1/completions", json=GREEDY | {"max_tokens": MADE} | body)


def text_of(reply: httpx.Response) -> str:
    return str(reply.json()["choices"][0]["text"])


def test_an_update_of_the_model_mixes_no_two_and_ends_no_answer(
    http: httpx.Client, models: dict[str, Path], tmp_path: Path
) -> None:
    deploy(models["old"], tmp_path)
    expected = {"old": {prompt: text_of(complete(http, prompt=prompt)) for prompt in PROMPTS}}
    start = text_of(complete(http, prompt="and then", max_tokens=64)).removesuffix("\ufffd")
    assert complete(http, prompt="kept", session_id="kept").status_code == 200

    replies: list[tuple[str, httpx.Response]] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=http.base_url, timeout=60) as client:
            while not stop.is_set():
                prompt = PROMPTS[len(replies) % len(PROMPTS)]
                replies.append((prompt, complete(client, prompt=prompt)))
                time.sleep(0.05)

    answers: list[list[Any]] = [[], []]

    def read(answer: list[Any]) -> None:
        """Reads an answer without a session, which can be made nowhere else once it has begun."""
        body = GREEDY | {"prompt": "and then", "max_tokens": LONG, "stream": True}
        with httpx.Client(base_url=http.base_url, timeout=60) as client:
            body["stream_options"] = {"include_usage": True}
            with client.stream("POST", "/v1/completions", json=body) as reply:
                for _, data in events(reply.iter_lines()):
                    answer.append(data)

    threads = [threading.Thread(target=read, args=(answer,)) for answer in answers]
    threads.append(threading.Thread(target=ask))
    for thread in threads:
        thread.start()
    wait_until(lambda: len(replies) > 1 and all(len(answer) > 1 for answer in answers))
    deploy(models["new"], tmp_path)
    with httpx.Client(base_url=http.base_url, timeout=60) as client:
        expected["new"] = {p: text_of(complete(client, prompt=p)) for p in PROMPTS}
        listed = client.get("/v1/models").json()["data"][0]
        named = [complete(client, prompt="x", model=name) for name in ("new", "old")]
        lost = complete(client, session_id="kept")
    stop.set()
    for thread in threads:
        thread.join(LIMIT_S)

    assert {reply.status_code for _, reply in replies} == {200}
    for prompt, reply in replies:
        assert text_of(reply) == expected[reply.json()["model"]][prompt]
    assert {reply.json()["model"] for _, reply in replies} == {"old", "new"}
    assert not set(expected["old"].values()) & set(expected["new"].values())
    for answer in answers:
        assert answer[-1] == "[DONE]", answer[-1]
        assert answer[-2]["usage"]["completion_tokens"] == LONG
        text = "".join(data["choices"][0]["text"] for data in answer[:-1] if data["choices"])
        assert text.startswith(start)
    assert listed["id"] == "new"
    assert [reply.status_code for reply in named] == [200, 404]
    assert (lost.status_code, lost.json()["error"]["code"]) == (409, "other_model")
