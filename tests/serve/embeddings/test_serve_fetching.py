"""Fetching by URL: addresses, proxies, connections, limits and redirects."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from helpers.serve.embeddings import encoded, image_server, picture
from helpers.serve.fake_model import embed, make_parts
from serve.embeddings.media.fetching import ImageFetcher
from serve.embeddings.media.inputs import Reference, Sampling
from serve.ingress.errors import ApiError


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with image_server() as number:
        yield number


def fetch(*urls: str, rule: str, video: bool = False, **limits: Any) -> list[bytes]:
    async def run() -> list[bytes]:
        fetcher = ImageFetcher((rule,), **({"max_bytes": 100_000, "timeout_s": 60.0} | limits))
        try:
            sampling = Sampling() if video else None
            return [await fetcher.fetch(Reference("input", url, True, sampling)) for url in urls]
        finally:
            await fetcher.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    "addresses", [["93.184.216.34", "10.0.0.1"], ["10.0.0.1", "93.184.216.34"], ["10.0.0.1"]]
)
def test_one_address_that_is_not_public_is_enough_to_refuse(
    addresses: list[str], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(self: object, host: str, port: int, **_: object) -> list[Any]:
        return [(2, 1, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", resolve)
    with pytest.raises(ApiError) as caught:
        fetch(f"http://two.example.org:{port}/", rule=f"two.example.org:{port}")
    assert (caught.value.code, caught.value.param) == ("url_not_allowed", "input")


def test_proxies_of_the_environment_are_not_asked(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        (body,) = fetch(f"http://127.0.0.1:{port}/ok.png", rule=f"private:127.0.0.1:{port}")
    assert body == encoded(picture(1))


def test_a_connection_is_not_kept_for_another_name_of_its_address() -> None:
    seen: list[tuple[Any, str]] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections if the client does

        def do_GET(self) -> None:
            seen.append((self.client_address, self.headers["host"]))
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    try:
        urls = [f"http://{host}:{port}/" for host in ("127.0.0.1", "localhost", "127.0.0.1")]
        assert fetch(*urls, rule=f"private:*:{port}") == [b"ok"] * 3
    finally:
        server.shutdown()
        server.server_close()
    assert [host for _, host in seen] == [url[len("http://") : -1] for url in urls]
    assert len({client for client, _ in seen}) == 3


@pytest.mark.parametrize("route", ["/sized?{}", "/redirect?/sized?{}"])
@pytest.mark.parametrize("video", [False, True])
def test_the_limit_is_exact_where_no_length_is_announced(
    port: int, route: str, video: bool
) -> None:
    def get(size: int) -> bytes:
        url = f"http://127.0.0.1:{port}{route.format(size)}"
        limits = {"max_bytes": 5, "max_video_bytes": 4_001} if video else {"max_bytes": 4_001}
        (body,) = fetch(url, rule=f"private:127.0.0.1:{port}", video=video, **limits)
        return body

    assert get(4_001) == bytes(4_001)
    with pytest.raises(ApiError) as caught:
        get(4_002)
    assert (caught.value.status, caught.value.param) == (413, "input")


def test_the_limit_is_exact_where_a_length_is_announced(port: int) -> None:
    size, rule = len(encoded(picture(1))), f"private:127.0.0.1:{port}"
    url = f"http://127.0.0.1:{port}/ok.png"
    assert len(fetch(url, rule=rule, max_bytes=size)[0]) == size
    with pytest.raises(ApiError) as caught:
        fetch(url, rule=rule, max_bytes=size - 1)
    assert caught.value.status == 413


def test_three_redirects_are_followed_and_no_fourth(port: int) -> None:
    def get(redirects: int) -> bytes:
        url = f"http://127.0.0.1:{port}" + "/redirect?" * redirects + "/ok.png"
        (body,) = fetch(url, rule=f"private:127.0.0.1:{port}")
        return body

    assert get(3) == encoded(picture(1))
    with pytest.raises(ApiError, match="too many redirects") as caught:
        get(4)
    assert caught.value.code == "fetch_failed"


@pytest.mark.parametrize(
    ("location", "code", "message"),
    [
        ("", "fetch_failed", "answered 302"),
        ("http://[::1", "fetch_failed", "could not be fetched"),
        ("http://a:b/", "fetch_failed", "could not be fetched"),
        ("file:///etc/passwd", "invalid_url", "only http and https"),
    ],
)
def test_redirects_to_nowhere(port: int, location: str, code: str, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        fetch(f"http://127.0.0.1:{port}/redirect?{location}", rule=f"private:127.0.0.1:{port}")
    assert (caught.value.status, caught.value.code) == (400, code)


def test_the_time_of_a_fetch_is_the_setting() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # takes connections and never answers
        port = silent.getsockname()[1]
        parts = make_parts(fetch_timeout_s=0.1, allow_hosts=(f"private:127.0.0.1:{port}",))
        reply = embed(parts, input=f"http://127.0.0.1:{port}/a.png")
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (400, "fetch_timeout")
    assert "within 0.1 s" in error["message"]
