"""Fetches images and videos by URL, without giving clients access to the server's own network.

Nothing is fetched unless hosts are allowed. For each fetch and each redirect, scheme, host and port
are checked against the allow list. The name is resolved once, every address must be public (unless
the rule says `private:`), and the connection goes to the address that was checked, so that a second
look-up cannot change it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx

from serve.embeddings.media.inputs import Reference, too_large
from serve.ingress.errors import ApiError

MAX_REDIRECTS = 3
_DEFAULT_PORTS = {"http": 80, "https": 443}
# Public networks whose addresses contain an IPv4 address that may be private.
_TUNNELS = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "2002::/16", "2001::/32")))


@dataclass(frozen=True)
class HostRule:
    """One entry of `allow_hosts`."""

    host: str
    port: int | None
    private: bool

    @classmethod
    def parse(cls, text: str) -> HostRule:
        """Reads `[private:]host[:port]` (checked by `ServeSettings`)."""
        private = text.startswith("private:")
        text = text.removeprefix("private:")
        head, colon, tail = text.rpartition(":")
        if colon and tail.isdigit() and not (text.startswith("[") and text.endswith("]")):
            return cls(head.strip("[]"), int(tail), private)
        return cls(text.strip("[]"), None, private)

    def allows(self, host: str, port: int) -> bool:
        """Returns whether this rule allows a host and port."""
        if port != self.port and (self.port is not None or port not in _DEFAULT_PORTS.values()):
            return False
        if self.host == "*":
            return True
        return host.endswith(self.host) if self.host.startswith(".") else host == self.host


def is_public(address: str) -> bool:
    """Returns whether an IP address is public; an IPv4-mapped one counts as its IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if any(ip in network for network in _TUNNELS):
            return False
        ip = ip.ipv4_mapped or ip
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


class ImageFetcher:
    """Fetches the image or video behind a reference's URL.

    Args:
        allow_hosts: entries of `ServeSettings.allow_hosts`.
        max_bytes: bytes of an image at most.
        max_video_bytes: bytes of a video at most; None means `max_bytes`.
        timeout_s: seconds for one fetch with its redirects.
    """

    def __init__(
        self,
        allow_hosts: tuple[str, ...],
        *,
        max_bytes: int,
        max_video_bytes: int | None = None,
        timeout_s: float,
    ) -> None:
        self._rules = [HostRule.parse(text) for text in allow_hosts]
        self._max_bytes = {"image": max_bytes, "video": max_video_bytes or max_bytes}
        self._timeout_s = timeout_s
        # A proxy from the environment would resolve names again, unchecked. Connections are not
        # kept, because they are found by address and could carry a request for another name there.
        self._client = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=timeout_s,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    async def fetch(self, reference: Reference) -> bytes:
        """Returns the bytes behind a URL.

        Raises:
            ApiError: 400 if the URL is not allowed or its server does not deliver, 413 if the body
                is too long.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._opened(reference) as response:
                    return await self._read(response, reference)
        except TimeoutError as error:
            raise self._too_slow(reference) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _failed(reference, error) from error

    async def stream(self, reference: Reference) -> AsyncGenerator[bytes, None]:
        """Yields the bytes behind a URL as they come; they need not end.

        Raises:
            ApiError: as `fetch`, but bytes are not limited, and the time limit holds for each wait
                for the source.
        """
        try:
            async with self._opened(reference) as response:
                async for piece in response.aiter_raw():
                    yield piece
        except httpx.TimeoutException as error:
            raise self._too_slow(reference) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _failed(reference, error) from error

    def _too_slow(self, reference: Reference) -> ApiError:
        message = f"the {reference.kind} did not arrive within {self._timeout_s:g} s"
        return ApiError(400, "fetch_timeout", message, param=reference.param)

    async def close(self) -> None:
        """Closes pooled connections."""
        await self._client.aclose()

    @asynccontextmanager
    async def _opened(self, reference: Reference) -> AsyncIterator[httpx.Response]:
        """Follows redirects and yields the final reply, whose body is not read yet."""
        url = reference.text
        for _ in range(MAX_REDIRECTS + 1):
            request = await self._checked_request(url, reference)
            response = await self._client.send(request, stream=True)
            try:
                if not response.has_redirect_location:
                    _check_head(response, reference)
                    yield response
                    return
                # The request went to an address, but a relative Location refers to the name.
                url = urljoin(url, response.headers["location"])
            finally:
                await response.aclose()
        raise ApiError(400, "fetch_failed", "too many redirects", param=reference.param)

    async def _checked_request(self, url: str, reference: Reference) -> httpx.Request:
        param = reference.param
        parts, host, port = _split(url, param)
        rule = next((rule for rule in self._rules if rule.allows(host, port)), None)
        if rule is None:
            message = f"fetching by URL is off on this server; send the {reference.kind} inline"
            if self._rules:
                message = f"fetching from {host}:{port} is not allowed on this server"
            raise ApiError(400, "url_not_allowed", message, param=param)
        address = await _resolve(host, port, private=rule.private, param=param)
        literal = f"[{address}]" if ":" in address else address
        pinned = parts._replace(netloc=f"{literal}:{port}", fragment="")
        shown = f"[{host}]" if ":" in host else host
        is_default = port == _DEFAULT_PORTS[parts.scheme]
        return self._client.build_request(
            "GET",
            pinned.geturl(),
            headers={
                "Host": shown if is_default else f"{shown}:{port}",
                "Accept": f"{reference.kind}/*",
                # A compressed body could exceed the byte limit once it is decompressed.
                "Accept-Encoding": "identity",
                "User-Agent": "rayjepa",
            },
            extensions={"sni_hostname": host},  # TLS verifies the name, not the address
        )

    async def _read(self, response: httpx.Response, reference: Reference) -> bytes:
        most = self._max_bytes[reference.kind]
        length = response.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise too_large(reference, most)
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > most:
                raise too_large(reference, most)
        return bytes(body)


def _check_head(response: httpx.Response, reference: Reference) -> None:
    """Raises a 400 for a reply that has no uncompressed body."""
    problem = ""
    if response.status_code != 200:
        problem = f"answered {response.status_code}"
    elif response.headers.get("content-encoding", "identity") != "identity":
        problem = "sent a compressed body"
    if problem:
        message = f"the {reference.kind}'s server {problem}"
        raise ApiError(400, "fetch_failed", message, param=reference.param)


def _failed(reference: Reference, error: Exception) -> ApiError:
    message = f"the {reference.kind} could not be fetched: {type(error).__name__}"
    return ApiError(400, "fetch_failed", message, param=reference.param)


def _split(url: str, param: str) -> tuple[SplitResult, str, int]:
    """Checks a URL and returns its parts, its host in lower case without last dot, and its port."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower().rstrip(".").encode("idna").decode("ascii")
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    except (ValueError, UnicodeError) as error:
        raise ApiError(400, "invalid_url", "malformed URL", param=param) from error
    if parts.scheme not in _DEFAULT_PORTS:
        message = f"only http and https URLs are fetched, not {parts.scheme or 'this'}"
        raise ApiError(400, "invalid_url", message, param=param)
    if not host or parts.username is not None or parts.password is not None:
        message = "a URL needs a host and no user name or password"
        raise ApiError(400, "invalid_url", message, param=param)
    return parts, host, port


async def _resolve(host: str, port: int, *, private: bool, param: str) -> str:
    """Returns one address of a host, after checking all of them."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        message = f"host {host} does not resolve"
        raise ApiError(400, "fetch_failed", message, param=param) from error
    addresses = [str(entry[4][0]) for entry in found]
    if not private and not all(map(is_public, addresses)):
        message = f"host {host} has an address that is not public"
        raise ApiError(400, "url_not_allowed", message, param=param)
    return addresses[0]
