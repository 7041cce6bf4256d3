"""The served application over real HTTP on a real Ray: two model replicas, one ingress."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from helpers.models.video_files import write_video
from helpers.repository import ROOT
from helpers.serve.asking import asking
from helpers.serve.bad_requests import MALFORMED, PNG, URI
from helpers.serve.embeddings import (
    PATCHES,
    SIZE,
    WIDTH,
    base64_of,
    data_uri,
    direct_tokens,
    encoded,
    image_server,
    miss_killed_replicas_soon,
    picture,
    png_uri,
    save_tiny_artifact,
    unit,
)
from helpers.serve.processes import replica_pids
from helpers.waiting import wait_until

pytestmark = pytest.mark.ray

APP = f"embeddings{os.getpid()}"


@dataclass(frozen=True)
class Served:
    url: str
    artifact: Path
    images_port: int


@pytest.fixture(scope="module")
def served(serve_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from ray import serve as ray_serve

    from serve import app
    from serve.embeddings.settings import ServeSettings

    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    save_tiny_artifact(folder)
    with image_server() as images_port, pytest.MonkeyPatch.context() as patch:
        miss_killed_replicas_soon(patch, app)
        settings = ServeSettings(
            artifact=str(folder),
            num_replicas=2,
            threads=1,
            cpus=0.1,
            ingress_cpus=0.1,
            max_request_bytes=300_000,
            max_image_bytes=60_000,
            max_pixels=2_000_000,
            max_items=4,
            body_timeout_s=3,
            allow_hosts=(f"private:127.0.0.1:{images_port}", "localhost"),
        )
        ray_serve.run(app.build_app(settings), name=APP)
        yield Served(serve_url, folder, images_port)
        ray_serve.delete(APP)


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0)


def cosine(a: Any, b: Any) -> float:
    return float(unit(np.asarray(a)) @ unit(np.asarray(b)))


def test_openai_client_gets_the_direct_forward(served: Served, client: openai.OpenAI) -> None:
    images = [encoded(picture(seed), form) for seed, form in enumerate(["PNG", "JPEG", "WEBP"])]
    expected = np.stack([direct_tokens(served.artifact, image).mean(axis=0) for image in images])
    # The client asks for base64 by itself and decodes it.
    reply = client.embeddings.create(model="tiny", input=[data_uri(image) for image in images])
    got = np.array([entry.embedding for entry in reply.data])
    assert got.shape == (3, WIDTH)
    assert [entry.index for entry in reply.data] == [0, 1, 2]
    assert reply.usage.prompt_tokens == 3 * PATCHES
    assert reply.model == "tiny"
    for vector, direct in zip(got, expected, strict=True):
        assert 1 - cosine(vector, direct) < 1e-5
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    assert abs(cosine(got[0], got[1])) < 0.999  # the images do differ

    floats = client.embeddings.create(
        model="tiny", input=base64_of(images[0]), encoding_format="float", dimensions=8
    )
    np.testing.assert_allclose(floats.data[0].embedding, unit(expected[0][:8]), atol=1e-5)


def test_patches(served: Served, http: httpx.Client, client: openai.OpenAI) -> None:
    expected = unit(direct_tokens(served.artifact, PNG))
    body = {"input": {"image": URI}, "pooling": "patches"}
    (entry,) = http.post("/v1/embeddings", json=body).json()["data"]
    assert entry["shape"] == [PATCHES, WIDTH]
    np.testing.assert_allclose(entry["embedding"], expected, atol=1e-5)
    (entry,) = http.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()["data"]
    values = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4").reshape(entry["shape"])
    np.testing.assert_allclose(values, expected, atol=1e-5)
    extra = {"pooling": "patches"}
    (flat,) = client.embeddings.create(model="tiny", input=URI, extra_body=extra).data
    np.testing.assert_allclose(np.reshape(flat.embedding, (PATCHES, WIDTH)), expected, atol=1e-5)


def test_every_client_s_form_of_input_gives_the_same(served: Served, http: httpx.Client) -> None:
    url = f"http://127.0.0.1:{served.images_port}/redirect?/ok.png"
    part = {"type": "image_url", "image_url": {"url": png_uri(1)}}
    shapes: list[Any] = [
        png_uri(1),
        [base64_of(encoded(picture(1)))],
        url,
        {"image": png_uri(1)},
        {"bytes": base64_of(encoded(picture(1)))},
        [{"url": url}],
        [part],
        [{"content": [part]}],
    ]
    vectors = []
    for shape in shapes:
        reply = http.post("/v1/embeddings", json={"input": shape, "modality": "image"})
        assert reply.status_code == 200, reply.text
        vectors.append(reply.json()["data"][0]["embedding"])
    for vector in vectors:
        np.testing.assert_allclose(vector, vectors[0], atol=1e-5)


def test_sizes_modes_and_a_single_pixel(http: httpx.Client) -> None:
    images = [picture(0, (1, 1)), picture(0, (300, 2)), picture(0).convert("L")]
    images += [picture(0).convert("P"), picture(0).convert("RGBA")]
    for image in images:
        reply = http.post("/v1/embeddings", json={"input": data_uri(encoded(image))})
        assert reply.status_code == 200, reply.text
        assert np.isfinite(reply.json()["data"][0]["embedding"]).all()
    reply = http.post("/v1/embeddings", json={"input": URI})  # #609 of infinity: still alive?
    assert reply.status_code == 200


def check_error(reply: httpx.Response, status: int, code: str, param: str | None) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert error["param"] == param
    assert error["message"]
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [case[1:] for case in MALFORMED],
    ids=[case[0] for case in MALFORMED],
)
def test_malformed_requests(
    served: Served, http: httpx.Client, body: Any, status: int, code: str, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    content = content.replace(b"IMAGES", f"http://127.0.0.1:{served.images_port}".encode())
    headers = {"content-type": "application/json"}
    check_error(http.post("/v1/embeddings", content=content, headers=headers), status, code, param)


def test_malformed_http(http: httpx.Client) -> None:
    good = json.dumps({"input": URI}).encode()
    assert len(MALFORMED) >= 40

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 10_000  # no content-length: the limit must count for itself

    json_type = {"content-type": "application/json"}
    post = "/v1/embeddings"
    check_error(
        http.post(post, content=chunks(), headers=json_type), 413, "request_too_large", None
    )
    form = http.post(post, data={"input": URI})
    check_error(form, 415, "unsupported_content_type", None)
    check_error(http.post(post, content=good), 415, "unsupported_content_type", None)
    squeezed = http.post(post, content=good, headers=json_type | {"content-encoding": "gzip"})
    check_error(squeezed, 415, "unsupported_content_encoding", None)
    check_error(http.get(post), 405, "method_not_allowed", None)
    check_error(http.delete("/v1/models"), 405, "method_not_allowed", None)
    check_error(http.get("/v1/nothing"), 404, "route_not_found", None)
    check_error(http.post("/v1/embeddings/", json={}), 400, "missing_field", "input")
    check_error(http.get("/v1/models/none"), 404, "model_not_found", "model")


def test_openai_client_sees_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="tiny", input="hello")
    assert (caught.value.code, caught.value.param) == ("invalid_base64", "input")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="nope", input=URI)


def test_bad_images_fail_alone_among_batch_mates(served: Served, client: openai.OpenAI) -> None:
    expected = [direct_tokens(served.artifact, encoded(picture(seed))).mean(0) for seed in range(8)]
    outcomes: dict[int, Any] = {}

    def one(number: int) -> None:
        spoilt = number % 3 == 0
        uri = data_uri(PNG[:150]) if spoilt else png_uri(number % 8)
        try:
            outcomes[number] = client.embeddings.create(model="tiny", input=uri).data[0].embedding
        except openai.BadRequestError as error:
            outcomes[number] = error.code

    threads = [threading.Thread(target=one, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, outcome in outcomes.items():
        if number % 3 == 0:
            assert outcome == "truncated"
        else:
            assert 1 - cosine(outcome, expected[number % 8]) < 1e-5


def test_models_health_metrics_and_request_ids(http: httpx.Client, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny").id == "tiny"
    described = http.get("/v1/models/tiny").json()
    assert (described["dimensions"], described["image_size"]) == (WIDTH, SIZE)
    health = http.get("/healthz", headers={"x-request-id": "mine-1"})
    assert (health.status_code, health.headers.get_list("x-request-id")) == (200, ["mine-1"])
    assert http.get("/docs").status_code == 200
    assert http.post("/v1/embeddings", json={"input": URI}).status_code == 200
    # Model replicas report every five seconds.
    wait_until(lambda: "rayjepa_images_total" in http.get("/metrics").text, every_s=0.2)
    text = http.get("/metrics").text
    assert 'rayjepa_requests_total{route="/v1/embeddings",status="200"}' in text
    assert 'rayjepa_request_seconds_bucket{le="0.1",route="/v1/embeddings"}' in text
    assert "rayjepa_batch_size_count" in text
    section = (ROOT / "docs" / "serving.md").read_text().partition("## Metrics")[2]
    named = set(re.findall(r"rayjepa_[a-z_]+", section.partition("\n## ")[0]))
    assert len(named) > 10
    assert [name for name in sorted(named) if name not in text] == []


def test_half_sent_bodies_beside_normal_requests(served: Served, http: httpx.Client) -> None:
    """Serve hands all of them to the ingress, where they hold no place and end by themselves."""
    port = int(served.url.rpartition(":")[2])
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    half = f"{head}Content-Length: 100\r\n\r\n{{".encode()
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(150)
        ]
        for each in sockets:
            each.settimeout(60)
            each.sendall(half)
        for _ in range(5):
            for path in ("/healthz", "/v1/models", "/metrics"):
                assert http.get(path).status_code == 200
            assert http.post("/v1/embeddings", json={"input": URI}).status_code == 200
        replies = [each.makefile("rb").read() for each in sockets]  # until the server closes
    for reply in replies:
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"


def test_streams_and_videos_through_serve(served: Served, http: httpx.Client) -> None:
    """One clip a frame with this encoder of images; what is left to Serve is the socket."""
    url = f"{served.url.replace('http', 'ws')}/v1/streams"
    with connect(url) as socket:
        socket.send('{"type": "start", "every": 1}')
        assert json.loads(socket.recv(timeout=30))["type"] == "started"
        for number in range(3):
            image = encoded(picture(number), "JPEG")
            socket.send(image)
            message = json.loads(socket.recv(timeout=30))
            assert (message["index"], message["last_frame"]) == (number, number)
            expected = direct_tokens(served.artifact, image).mean(axis=0)
            assert 1 - cosine(message["embedding"], expected) < 1e-5
        socket.send('{"type": "ack", "index": 2}')
        socket.send('{"type": "end"}')
        ended = json.loads(socket.recv(timeout=30))
        assert (ended["type"], ended["received"], ended["dropped"]) == ("ended", 3, 0)
        with pytest.raises(ConnectionClosed):
            socket.recv(timeout=30)
        assert socket.close_code == 1000
    with connect(url) as socket:
        socket.send('{"type": "stop"}')
        assert json.loads(socket.recv(timeout=30))["error"]["code"] == "invalid_message"
    video = write_video(io.BytesIO(), 30, container="mp4").getvalue()
    body = {"input": {"video": data_uri(video, "video/mp4"), "fps": 4}, "pooling": "per_frame"}
    (entry,) = http.post("/v1/embeddings", json=body).json()["data"]
    assert entry["shape"] == [4, WIDTH]
    assert len(entry["times_s"]) == 4


def test_killed_replicas_lose_no_request(served: Served) -> None:
    """SIGKILL a model replica, then the only ingress, while eight clients ask without pause."""
    with asking(served.url, [png_uri(number) for number in range(8)]) as clients:
        clients.wait_for_all()
        for deployment in ("Embedder", "Ingress"):
            os.kill(replica_pids(APP, deployment)[0], signal.SIGKILL)
            clients.wait_for_more(50)  # it came back
    assert not clients.failures
    assert len(replica_pids(APP, "Embedder")) >= 1
