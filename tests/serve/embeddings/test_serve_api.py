"""The embeddings application with a fake model, without Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from helpers.serve.embeddings import PATCHES, SIZE, WIDTH, unit
from helpers.serve.fake_model import CARD, URI, call, embed, fake_embed, make_parts
from helpers.waiting import eventually
from models.media.preprocessing import EncoderInput
from serve.embeddings.contract import EMBEDDER
from serve.embeddings.frontend.client import EmbedderClient
from serve.ingress.errors import ApiError
from serve.ingress.model_handle import DeployedModel


def test_truncates_first_then_normalises() -> None:
    ramp = np.arange(1, WIDTH + 1, dtype=np.float32)
    for dimensions in (1, 5, WIDTH, None):
        body = {"input": URI} | ({"dimensions": dimensions} if dimensions else {})
        vector = embed(make_parts(), **body).json()["data"][0]["embedding"]
        np.testing.assert_allclose(vector, unit(ramp[:dimensions]), rtol=1e-5)
    raw = embed(make_parts(), input=URI, normalize=False, dimensions=3).json()
    vector = np.array(raw["data"][0]["embedding"])
    np.testing.assert_allclose(vector / vector[0], [1, 2, 3], rtol=1e-5)
    assert vector[0] > 2  # the mean colour itself, not a unit vector


def test_usage_counts_patches() -> None:
    reply = embed(make_parts(), input=[URI, URI, URI]).json()
    assert reply["usage"] == {"prompt_tokens": 3 * PATCHES, "total_tokens": 3 * PATCHES}
    assert [entry["index"] for entry in reply["data"]] == [0, 1, 2]


@pytest.mark.parametrize("prefix", ["", "/embed", "/v1"])
def test_api_key_guards_all_but_the_open_paths_under_any_route_prefix(prefix: str) -> None:
    # As Serve passes it on: the prefix is `root_path` and still stands in the path.
    parts = make_parts(api_key="s3cret")
    good = {"headers": {"Authorization": "Bearer s3cret"}}
    bad = [
        {},
        {"headers": {"Authorization": "Bearer s3cre"}},
        {"headers": {"Authorization": "Bearer s3cret2"}},
        {"headers": {"Authorization": "s3cret"}},
        {"headers": {"Authorization": "Basic s3cret"}},
    ]
    models = f"{prefix}/v1/models"
    requests = [("GET", models, good)]
    requests += [("GET", prefix + path, {}) for path in ("/healthz", "/metrics", "/openapi.json")]
    closed = [("GET", models, kw) for kw in bad] + [("POST", f"{prefix}/v1/embeddings", {})]
    closed += [("GET", f"{prefix}/healthz/x", {}), ("GET", f"{prefix}{prefix}/v1/models", {})]
    replies = call(parts, *requests, *closed, root_path=prefix)
    assert [reply.status_code for reply in replies[:4]] == [200] * 4
    for reply in replies[4:]:
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    assert "s3cret" not in replies[4].text


def test_overload_is_shed_with_429_and_the_rest_served() -> None:
    async def slow(inputs: Sequence[EncoderInput], *_: Any) -> list[np.ndarray]:
        await eventually(lambda: count("429") == 8)
        return await fake_embed(inputs, "mean")

    def count(status: str) -> float | None:
        labels = {"route": "/v1/embeddings", "status": status}
        return parts.metrics.registry.get_sample_value("rayjepa_requests_total", labels)

    parts = make_parts(slow, max_queued=4, max_items=4)
    post = ("POST", "/v1/embeddings", {"json": {"input": [URI, URI]}})
    replies = call(parts, *([post] * 10))
    statuses = sorted(reply.status_code for reply in replies)
    assert statuses == [200] * 2 + [429] * 8  # two requests of two images fit
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert refused.json()["error"]["code"] == "queue_full"
    assert call(parts, post)[0].status_code == 200  # the places are free again
    assert parts.service.admission.images == 0


def test_slow_model_gets_a_504() -> None:
    async def hang(inputs: Sequence[EncoderInput], *_: Any) -> list[np.ndarray]:
        await asyncio.sleep(60)
        return await fake_embed(inputs, "mean")

    parts = make_parts(hang, timeout_s=0.2)
    reply = embed(parts, input=URI)
    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "timeout"
    assert parts.service.admission.images == 0


def test_an_unexpected_error_tells_the_client_nothing() -> None:
    async def broken(inputs: Sequence[EncoderInput], *_: Any) -> list[np.ndarray]:
        raise RuntimeError("secret path /private/weights")

    parts = make_parts(broken)
    reply = embed(parts, input=URI)
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"
    assert "secret" not in reply.text
    labels = {"route": "/v1/embeddings", "status": "500"}
    assert parts.metrics.registry.get_sample_value("rayjepa_requests_total", labels) == 1


def test_unready_is_a_503() -> None:
    (reply,) = call(make_parts(ready=False), ("GET", "/healthz", {}))
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "not_ready"


def test_scanners_do_not_grow_the_metrics() -> None:
    parts = make_parts()
    call(parts, *(("GET", f"/wp-admin/{number}", {}) for number in range(20)))
    labels = {"route": "other", "status": "404"}
    assert parts.metrics.registry.get_sample_value("rayjepa_requests_total", labels) == 20


def test_a_leaving_client_frees_its_places() -> None:
    started = asyncio.Event

    async def run() -> None:
        entered = started()

        async def hang(inputs: Sequence[EncoderInput], *_: Any) -> list[np.ndarray]:
            entered.set()
            await asyncio.sleep(60)
            return []

        parts = make_parts(hang)
        request = asyncio.create_task(parts.service.answer(json.dumps({"input": URI}).encode()))
        await entered.wait()
        assert parts.service.admission.images == 1
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert parts.service.admission.images == 0

    asyncio.run(run())


class _Handle:
    """A Serve handle whose calls fail as told before they succeed."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.embed = self

    async def remote(
        self, inputs: Sequence[EncoderInput], pooling: str, fingerprint: str
    ) -> list[np.ndarray]:
        if self.failures:
            raise self.failures.pop(0)
        return await fake_embed(inputs, "mean")


def test_a_dying_replica_is_retried_a_full_queue_is_not() -> None:
    image = EncoderInput(np.zeros((SIZE, SIZE, 3), np.uint8))

    def run(*failures: Exception) -> list[np.ndarray]:
        model = DeployedModel(_Handle(*failures), EMBEDDER)
        return asyncio.run(EmbedderClient(model, CARD).embed([image], "mean", CARD))

    assert [row.shape for row in run(ActorDiedError(), ActorDiedError())] == [(WIDTH,)]
    with pytest.raises(ApiError) as gone:
        run(*[ActorDiedError()] * 3)
    assert (gone.value.status, gone.value.code) == (503, "no_replica")
    with pytest.raises(ApiError) as full:
        run(BackPressureError(1, 1))
    assert (full.value.status, full.value.code) == (429, "queue_full")


def test_openapi_describes_the_request() -> None:
    (reply,) = call(make_parts(), ("GET", "/openapi.json", {}))
    operation = reply.json()["paths"]["/v1/embeddings"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) >= {"input", "model", "encoding_format", "dimensions"}
    assert schema["additionalProperties"] is False
