"""Parsing, fetching, batching and settings of the server, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge
from pydantic import ValidationError

from helpers.repository import ROOT
from helpers.serve.embeddings import encoded, image_server, picture
from models.media.preprocessing import Preprocessing
from serve.app import Ingress
from serve.embeddings.contract import EMBEDDER
from serve.embeddings.media.fetching import HostRule, ImageFetcher, is_public
from serve.embeddings.media.inputs import Reference, decode_base64, parse_input, to_input
from serve.embeddings.settings import ServeSettings
from serve.embeddings.streams.frame_queue import QUEUE_BYTES, FrameQueue
from serve.embeddings.streams.routes import BUFFER_BYTES, ByteBuffer
from serve.ingress.errors import ApiError
from serve.telemetry import Telemetry, render, snapshot

PREP = Preprocessing(image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
URL = "https://example.org/a.png"


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(ValidationError, match="bach_size"):
        ServeSettings.model_validate({"artifact": "a", "bach_size": 4})
    with pytest.raises(ValidationError, match="artifact"):
        ServeSettings.model_validate({})
    with pytest.raises(ValidationError, match="max_items"):
        ServeSettings(artifact="a", max_items=300, max_queued=10)
    with pytest.raises(ValidationError, match="http://a"):
        ServeSettings(artifact="a", allow_hosts=("http://a",))


def test_settings_read_the_command_lines_text() -> None:
    settings = ServeSettings.model_validate(
        {"artifact": "a", "batch_size": "8", "allow_hosts": "a.org,.b.org:8080", "dtype": "bf16"}
    )
    assert settings.batch_size == 8
    assert settings.allow_hosts == ("a.org", ".b.org:8080")


@pytest.mark.parametrize(
    ("item", "param", "is_url"),
    [
        ("aGk=", "input", False),
        (URL, "input", True),
        ({"image": URL}, "input.image", True),
        ({"image": "aGk="}, "input.image", False),
        ({"url": URL}, "input.url", True),
        ({"url": "data:image/png;base64,aGk="}, "input.url", False),
        ({"bytes": "aGk="}, "input.bytes", False),
        ({"type": "image_url", "image_url": {"url": URL}}, "input.image_url.url", True),
        ({"image_url": {"url": "aGk=", "detail": "low"}}, "input.image_url.url", False),
        (
            {"content": [{"type": "image_url", "image_url": {"url": URL}}]},
            "input.content[0].image_url.url",
            True,
        ),
    ],
)
def test_every_accepted_shape(item: Any, param: str, is_url: bool) -> None:
    (reference,) = parse_input(item, max_items=1)
    assert (reference.param, reference.is_url) == (param, is_url)
    (listed,) = parse_input([item], max_items=1)
    assert listed.param == param.replace("input", "input[0]", 1)


def test_base64_limit_is_exact() -> None:
    reference = Reference("input", "AAAAAAAA", False)  # six bytes
    assert decode_base64(reference, max_bytes=6) == bytes(6)
    with pytest.raises(ApiError) as caught:
        decode_base64(reference, max_bytes=5)
    assert caught.value.status == 413


def test_formats_that_run_programs_are_not_decoded() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    with pytest.raises(ApiError) as caught:
        to_input(eps, PREP, max_pixels=1000, param="input")
    assert caught.value.code == "not_an_image"
    for image_format in ("JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        found = to_input(encoded(picture(1), image_format), PREP, max_pixels=9999, param="input")
        pixels = found.input.pixels
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8


@pytest.mark.parametrize(
    ("rule", "host", "port", "allowed"),
    [
        ("a.org", "a.org", 443, True),
        ("a.org", "a.org", 80, True),
        ("a.org", "a.org", 22, False),
        ("a.org", "b.a.org", 443, False),
        ("a.org", "evila.org", 443, False),
        (".a.org", "b.a.org", 443, True),
        (".a.org", "a.org", 443, False),
        (".a.org", "evila.org", 443, False),
        ("a.org:8080", "a.org", 8080, True),
        ("a.org:8080", "a.org", 443, False),
        ("*", "any.where", 443, True),
        ("*", "any.where", 6379, False),
        ("private:127.0.0.1:9000", "127.0.0.1", 9000, True),
        ("[::1]", "::1", 80, True),
        ("[::1]:81", "::1", 81, True),
    ],
)
def test_host_rules(rule: str, host: str, port: int, allowed: bool) -> None:
    assert ServeSettings(artifact="a", allow_hosts=(rule,)).allow_hosts == (rule,)
    assert HostRule.parse(rule).allows(host, port) is allowed


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "192.168.0.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_public_addresses() -> None:
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1:248:1893:25c8:1946")
    assert is_public("::ffff:93.184.216.34")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with image_server() as number:
        yield number


def fetch(url: str, *rules: str, max_bytes: int = 100_000, timeout_s: float = 60.0) -> bytes:
    async def run() -> bytes:
        fetcher = ImageFetcher(rules, max_bytes=max_bytes, timeout_s=timeout_s)
        try:
            return await fetcher.fetch(Reference("input", url, True))
        finally:
            await fetcher.close()

    return asyncio.run(run())


def test_fetch_delivers(port: int) -> None:
    rule = f"private:127.0.0.1:{port}"
    assert fetch(f"http://127.0.0.1:{port}/ok.png", rule) == encoded(picture(1))
    redirected = fetch(f"http://127.0.0.1:{port}/redirect?/ok.png", rule)
    assert redirected == encoded(picture(1))


@pytest.mark.parametrize(
    ("path", "rules", "code"),
    [
        ("/ok.png", (), "url_not_allowed"),
        ("/ok.png", ("example.org",), "url_not_allowed"),
        ("/ok.png", ("127.0.0.1:{port}",), "url_not_allowed"),  # allowed by name, not public
        ("/ok.png", ("*:{port}",), "url_not_allowed"),
        (
            "/redirect?http://localhost:{port}/ok.png",
            ("private:127.0.0.1:{port}",),
            "url_not_allowed",
        ),
        (
            "/redirect?http://169.254.169.254/latest/meta-data",
            ("private:127.0.0.1:{port}", "*"),
            "url_not_allowed",
        ),
        ("/redirect?file:///etc/passwd", ("private:127.0.0.1:{port}",), "invalid_url"),
        ("/loop", ("private:127.0.0.1:{port}",), "fetch_failed"),
        ("/missing", ("private:127.0.0.1:{port}",), "fetch_failed"),
        ("/gzip", ("private:127.0.0.1:{port}",), "fetch_failed"),
        ("/big", ("private:127.0.0.1:{port}",), "image_too_large"),
        ("/endless", ("private:127.0.0.1:{port}",), "image_too_large"),
    ],
)  # fmt: skip
def test_fetch_refuses(port: int, path: str, rules: tuple[str, ...], code: str) -> None:
    url = f"http://127.0.0.1:{port}{path.format(port=port)}"
    with pytest.raises(ApiError) as caught:
        fetch(url, *(rule.format(port=port) for rule in rules))
    assert caught.value.code == code
    assert caught.value.param == "input"


@pytest.mark.parametrize(
    "url", ["http://user:pw@a.org/", "http:///x", "ftp://a.org/x", "http://a.org:99999/", "http://"]
)
def test_fetch_refuses_malformed_urls(url: str) -> None:
    with pytest.raises(ApiError) as caught:
        fetch(url, "*")
    assert caught.value.code == "invalid_url"


def test_fetch_connects_to_the_address_it_checked(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name whose second look-up would answer differently (DNS rebinding)."""
    answers = iter(["93.184.216.34"])

    async def resolve(self: object, host: str, port: int, **_: object) -> list[Any]:
        return [(2, 1, 6, "", (next(answers), port))]  # a second look-up raises StopIteration

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    with pytest.raises(ApiError) as caught:
        fetch(f"http://localhost:{port}/ok.png", f"localhost:{port}", timeout_s=0.3)
    assert caught.value.code in ("fetch_timeout", "fetch_failed")  # never reached loopback


def test_dropping_the_newest_and_skipping_to_a_rate() -> None:
    async def kept(queue: FrameQueue, times: list[float]) -> list[float]:
        for time_s in times:
            queue.put(time_s, 0.0, b"")
        queue.close()
        found = []
        while (frame := await queue.get()) is not None:
            found.append(frame.time_s)
        return found

    six = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    oldest, newest = FrameQueue(2, "oldest", None), FrameQueue(2, "newest", None)
    assert asyncio.run(kept(oldest, six)) == [4.0, 5.0]
    assert asyncio.run(kept(newest, six)) == [0.0, 1.0]
    assert oldest.dropped == newest.dropped == 4
    heavy = FrameQueue(99, "oldest", None)
    for number in range(5):
        heavy.put(float(number), 0.0, bytes(QUEUE_BYTES // 2))
    assert heavy.dropped == 3
    thinned = FrameQueue(99, "oldest", 10.0)
    thirty = [round(number / 30, 3) for number in range(30)]
    assert asyncio.run(kept(thinned, thirty)) == [thirty[number] for number in range(0, 30, 3)]
    assert (thinned.received, thinned.skipped) == (10, 20)
    slower = FrameQueue(
        99, "oldest", 10.0
    )  # than the rate: all are kept, and after a jump back too
    assert asyncio.run(kept(slower, [0.0, 0.2, 0.4, 9.0, 9.05, 0.1, 0.3])) == [
        0.0,
        0.2,
        0.4,
        9.0,
        0.1,
        0.3,
    ]


def test_bytes_that_wait_for_a_decoder_are_limited() -> None:
    buffer = ByteBuffer()
    buffer.put(bytes(BUFFER_BYTES))
    with pytest.raises(ApiError, match="wait for decoding") as caught:
        buffer.put(b"x")
    assert caught.value.code == "too_fast"


def test_metrics_are_summed_over_replicas() -> None:
    def replica(ok: int, in_flight: int) -> CollectorRegistry:
        registry = CollectorRegistry()
        Counter("rayjepa_requests", "Requests", ["status"], registry=registry).labels("200").inc(ok)
        Gauge("rayjepa_in_flight", "Now", registry=registry).set(in_flight)
        return registry

    text = render([snapshot(replica(3, 1)), snapshot(replica(4, 2))])
    assert 'rayjepa_requests_total{status="200"} 7.0' in text
    assert "rayjepa_in_flight 3.0" in text
    assert "# TYPE rayjepa_requests_total counter" in text

    async def main() -> str:
        telemetry = Telemetry()
        await telemetry.report("a", snapshot(replica(1, 0)))
        await telemetry.report("a", snapshot(replica(5, 0)))  # totals replace, they do not add up
        return await telemetry.scrape("b", snapshot(replica(2, 0)))

    assert 'rayjepa_requests_total{status="200"} 7.0' in asyncio.run(main())


def test_shipped_config_is_valid() -> None:
    """The shipped file fits Serve's schema and our settings, and its names exist."""
    from ray.serve.schema import ServeDeploySchema

    values = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(values)
    (application,) = schema.applications
    settings = ServeSettings.model_validate(application.args)
    assert application.import_path == "serve.app:build_app"
    assert schema.http_options.request_timeout_s > settings.timeout_s
    deployments = {deployment.name: deployment for deployment in application.deployments}
    assert settings.placement == "together"
    assert set(deployments) == {Ingress.__name__, Telemetry.__name__}
    # Serve's limits would count half-sent bodies, and the others stand against our settings.
    ours = {"graceful_shutdown_timeout_s", "ray_actor_options"}
    ours |= {"max_ongoing_requests", "max_queued_requests"}
    assert not ours & deployments["Ingress"].model_fields_set
    assert settings.drain_s > settings.timeout_s


def test_the_shipped_config_s_other_placement_is_valid() -> None:
    """What its end says in comments."""
    from ray.serve.schema import DeploymentSchema

    text = (ROOT / "serve" / "config.yaml").read_text().partition("\n#     - name: Embedder")
    lines = [line.removeprefix("#") for line in "".join(text[1:]).splitlines()]
    (given,) = yaml.safe_load("\n".join(lines))
    embedder = DeploymentSchema.model_validate(given)
    assert embedder.name == EMBEDDER
    ours = {"graceful_shutdown_timeout_s", "ray_actor_options"}
    assert not ours & embedder.model_fields_set
