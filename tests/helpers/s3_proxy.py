"""An HTTP proxy before an S3 server that counts what passes and misbehaves when told to."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
TRICKLE_S, LONGEST_HANG_S = 0.2, 60.0
HOP_BY_HOP = {"connection", "expect", "transfer-encoding", "content-length", "keep-alive"}


class S3Proxy:
    """Passes requests on; `down` refuses connections, `error_rate` spoils that share of requests.

    Spoiled requests meet the `troubles` in turn: `reset` of the connection, `slow_down` (a 503),
    `hang` without an answer, `cut` in the middle of the answer's body, `late` when the request was
    done and its answer is lost, `trickle` of the body over `TRICKLE_S`, or a code of S3 that
    refuses it. A `rule` says instead what each request meets, "" for nothing. `bytes_out` are
    bytes of bodies that were sent to clients, `requests` counts by method and path.

    Args:
        upstream: The server's URL.
        host: The address to listen at.
        port: The port; 0 for any.
    """

    def __init__(self, upstream: str, host: str = "127.0.0.1", port: int = 0) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.error_rate, self.seed = 0.0, random.Random(0)
        self.troubles: tuple[str, ...] = ("reset", "slow_down")
        self.calm = threading.Event()  # ends hanging requests
        self.withheld: frozenset[str] = frozenset()  # headers of requests, in lower case
        self.refuse: tuple[int, str] | None = None  # status and code that answer every request
        self.rule: Callable[[Any], str] | None = None  # what a request meets, by the handler
        self.spoiled = self.bytes_out = 0
        self.requests: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self.host, self.port = host, port
        self.up()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def count(self, method: str) -> int:
        """Requests of a method."""
        return sum(n for (name, _), n in self.requests.items() if name == method)

    def reset(self) -> None:
        """Sets the counts to zero."""
        self.spoiled = self.bytes_out = 0
        self.requests.clear()

    def up(self) -> None:
        """Listens, on the same port as before."""
        assert self._server is None
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _Server((self.host, self.port), handler)
        self.port = self._server.server_port
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def down(self) -> None:
        """Refuses connections, and resets those that are open."""
        server, self._server = self._server, None
        assert server is not None
        server.shutdown()
        server.server_close()
        for connection in list(self._open):
            _abort(connection)

    def down_for(self, seconds: float) -> threading.Timer:
        """Refuses connections from now on for some seconds; returns the timer that ends it."""
        self.down()
        timer = threading.Timer(seconds, self.up)
        timer.start()
        return timer

    def trouble_for(self, seconds: float, *troubles: str) -> threading.Timer:
        """Spoils every request for some seconds; returns the timer that ends it."""
        self.begin_trouble(1.0, *troubles)
        timer = threading.Timer(seconds, self.end_trouble)
        timer.start()
        return timer

    def begin_trouble(self, rate: float, *troubles: str) -> None:
        """Spoils a share of all requests from now on."""
        self.error_rate, self.troubles = rate, troubles

    def end_trouble(self) -> None:
        """Passes every request on again."""
        self.error_rate, self.troubles, self.rule = 0.0, ("reset", "slow_down"), None
        self.calm.set()
        self.calm = threading.Event()

    def close(self) -> None:
        """Ends the proxy."""
        if self._server is not None:
            self.down()

    def spoils(self) -> str:
        """Returns what the next request meets; "" passes it on."""
        with self._lock:
            if self.seed.random() >= self.error_rate:
                return ""
            self.spoiled += 1
            return self.troubles[self.spoiled % len(self.troubles)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stays silent: resets are what the tests want."""


class _Handler(BaseHTTPRequestHandler):
    proxy: S3Proxy
    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        self.proxy._open.add(self.connection)
        try:
            super().handle()
        finally:
            self.proxy._open.discard(self.connection)

    def log_message(self, *_: Any) -> None:
        """Stays silent."""

    def _answer(self) -> None:
        body = self._body()
        path = urlsplit(self.path).path
        self.proxy.requests[self.command, path] += 1
        if self.proxy.refuse:
            self._refuse(*self.proxy.refuse)
            return
        trouble = self.proxy.rule(self) if self.proxy.rule else self.proxy.spoils()
        self.close_connection = bool(trouble)
        if trouble[:1].isupper():
            self._refuse(403, trouble)
        elif trouble == "slow_down":
            self._send(503, [("Content-Type", "application/xml")], SLOW_DOWN)
        elif trouble in ("reset", "hang"):
            if trouble == "hang":
                self.proxy.calm.wait(LONGEST_HANG_S)
            _abort(self.connection)
        else:
            self._pass_on(body, trouble)

    def _refuse(self, status: int, code: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
        self._send(status, [], text.encode())

    def _pass_on(self, body: bytes, trouble: str) -> None:
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        with contextlib.closing(upstream):
            withheld = HOP_BY_HOP | self.proxy.withheld
            headers = {k: v for k, v in self.headers.items() if k.lower() not in withheld}
            upstream.request(self.command, self.path, body, headers | {"Connection": "close"})
            answer = upstream.getresponse()
            data = answer.read()
        if trouble == "late":
            _abort(self.connection)
        else:
            self._send(answer.status, answer.getheaders(), data, trouble)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline() not in (b"\r\n", b""):
            pass
        return data

    def _send(
        self, status: int, headers: list[tuple[str, str]], body: bytes, trouble: str = ""
    ) -> None:
        self.send_response_only(status)
        length = {k.lower(): v for k, v in headers}.get("content-length", "0")
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        head = self.command == "HEAD"
        self.send_header("Content-Length", length if head else str(len(body)))
        self.end_headers()
        if not head:
            with self.proxy._lock:
                self.proxy.bytes_out += len(body)
            self._write(body, trouble)

    def _write(self, body: bytes, trouble: str) -> None:
        half = len(body) // 2
        if trouble not in ("cut", "trickle"):
            self.wfile.write(body)
            return
        self.wfile.write(body[:half])
        self.wfile.flush()
        time.sleep(TRICKLE_S)
        if trouble == "cut":
            _abort(self.connection)
        else:
            self.wfile.write(body[half:])


def _abort(connection: socket.socket) -> None:
    """Closes a connection by a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()


@contextlib.contextmanager
def proxied(s3: dict[str, str]) -> Iterator[S3Proxy]:
    """Leads this process through a proxy to an S3, by environment variables, for the block."""
    import pytest
    import s3fs

    proxy = S3Proxy(s3["AWS_ENDPOINT_URL"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()  # those that lead past the proxy
        try:
            yield proxy
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            proxy.close()
    assert "AWS_ENDPOINT_URL" not in os.environ or os.environ["AWS_ENDPOINT_URL"] != proxy.url
