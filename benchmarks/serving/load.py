"""What the serving benchmark sends, how it measures the replies, and whose CPU time they took."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

HOST = "127.0.0.1"
ROLES = (
    "Ingress",
    "Embedder",
    "Telemetry",
    "ProxyActor",
    "HAProxyManager",
    "haproxy",
    "ServeController",
    "plain_app",
    "infinity_emb",
)
"""Parts of command lines that tell processes apart; all others are Ray's own."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is sent, and for how long at most."""

    jpeg_size: tuple[int, int] = (320, 256)
    """Width and height of the JPEGs (quality 90) that are sent."""
    images: int = 64
    """Different JPEGs, sent in turn."""
    concurrency: tuple[int, ...] = (1, 32)
    """Clients that each wait for a reply before they ask again; one image a request."""
    requests: tuple[int, ...] = (300, 1_000)
    """Requests at each concurrency."""
    warm_up: int = 64
    """Requests before the clock starts, at each concurrency."""
    max_seconds: float = 60.0
    """End a level after this time even if requests are left."""

    def __post_init__(self) -> None:
        if len(self.concurrency) != len(self.requests):
            raise ValueError("--load.requests needs one number for each --load.concurrency")


def make_jpegs(load: Load) -> list[bytes]:
    """Smooth random pictures with some noise: they compress about as photographs do."""
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(load.images):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize(load.jpeg_size, Image.Resampling.BICUBIC), np.int16)
        noisy = picture + rng.normal(0, 6, picture.shape).astype(np.int16)
        buffer = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    return jpegs


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server that runs."""

    port: int
    path: str = "/v1/embeddings"
    fields: tuple[tuple[str, str], ...] = ()
    """Further fields of every request."""


def make_requests(target: Target, jpegs: list[bytes]) -> list[bytes]:
    """Complete HTTP requests: the client must not spend the server's cores on building them."""
    requests = []
    for jpeg in jpegs:
        uri = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
        fields = {"input": uri, "encoding_format": "base64"} | dict(target.fields)
        body = json.dumps(fields).encode()
        head = (
            f"POST {target.path} HTTP/1.1\r\nHost: {HOST}:{target.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    return requests


def client(
    port: int, requests: list[bytes], concurrency: int, count: int, max_seconds: float
) -> dict[str, Any]:
    """Closed loop over kept-alive connections; returns latencies, errors, wall and CPU time."""
    latencies: list[float] = []
    errors: list[str] = []
    numbers = iter(range(count))

    async def ask_in_turn(deadline: float) -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        for number in numbers:
            began = time.perf_counter()
            if began > deadline:
                break
            try:
                writer.write(requests[number % len(requests)])
                head = await reader.readuntil(b"\r\n\r\n")
            except (ConnectionError, asyncio.IncompleteReadError):
                # A proxy that is replaced closes connections that are idle; clients connect again.
                reader, writer = await asyncio.open_connection(HOST, port)
                writer.write(requests[number % len(requests)])
                head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            if head[9:12] == b"200":
                latencies.append(time.perf_counter() - began)
            else:
                errors.append(f"{head[9:12].decode()} {body[:200]!r}")
        writer.close()

    async def run() -> None:
        deadline = time.perf_counter() + max_seconds
        await asyncio.gather(*(ask_in_turn(deadline) for _ in range(concurrency)))

    cpu, began = time.process_time(), time.perf_counter()
    asyncio.run(run())
    wall = time.perf_counter() - began
    return {
        "latencies": latencies,
        "errors": errors,
        "wall_s": wall,
        "cpu_s": time.process_time() - cpu,
    }


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Runs a function in a fresh process: its own memory, threads and CPU account."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, args)


def cpu_seconds() -> dict[str, float]:
    """CPU time so far of all processes that this one started, by role."""
    tick = os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    used: dict[int, tuple[str, float]] = {}
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # gone meanwhile
            continue
        parents[int(folder.name)] = int(fields[1])
        used[int(folder.name)] = (name, (int(fields[11]) + int(fields[12])) / tick)
    total: dict[str, float] = {}
    for pid, (name, seconds) in used.items():
        ancestor = pid
        while ancestor not in (0, os.getpid()):
            ancestor = parents.get(ancestor, 0)
        if ancestor and pid != os.getpid():
            role = role_of(name)
            total[role] = total.get(role, 0.0) + seconds
    return total


def role_of(command: str) -> str:
    """Names the part of the server that a process is, by its command line."""
    return next((role for role in ROLES if role in command[:120]), "rest of Ray")


def measure(target: Target, load: Load, requests: list[bytes], level: int) -> dict[str, Any]:
    """One concurrency: warm-up, then the counted requests."""
    concurrency, count = load.concurrency[level], load.requests[level]
    in_process(client, target.port, requests, concurrency, load.warm_up, load.max_seconds)
    before = cpu_seconds()
    got = in_process(client, target.port, requests, concurrency, count, load.max_seconds)
    after = cpu_seconds()
    done = max(1, len(got["latencies"]))
    cpu = {role: after[role] - before.get(role, 0.0) for role in after} | {"client": got["cpu_s"]}
    p50, p99 = np.percentile(got["latencies"] or [0.0], [50, 99])
    return {
        "concurrency": concurrency,
        "requests": len(got["latencies"]) + len(got["errors"]),
        "errors": len(got["errors"]),
        "first_errors": got["errors"][:3],
        "images_per_s": done / got["wall_s"],
        "p50_ms": p50 * 1e3,
        "p99_ms": p99 * 1e3,
        "cpu_ms_per_request": {role: s / done * 1e3 for role, s in sorted(cpu.items()) if s},
    }
