"""Endless sessions over HTTP: errors, time between tokens, memory.

    PYTHONPATH=. python benchmarks/language/sessions_http.py --model data/smollm2 --sessions 32 \
        --seconds 300

Starts the language model's Serve application, opens that many sessions with a pinned prefix each,
streams all of them at once without a token limit for the given time, then disconnects. Resident
memory is that of the model's and the ingress's replica and of the proxy, read every few seconds.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx
import ray
import torch
import tyro
from ray import serve as ray_serve
from serve_memory import resident_mib

from serve.lm.settings import LMSettings
from serve.lm_app import build_app

PREFIX = "You tell a story that never ends, one short sentence at a time. "
PROMPT = "Once upon a time, in a town by the sea, there lived a girl number "
PROCESSES = ("LanguageModel", "LMIngress", "ProxyActor")


@dataclass(frozen=True, kw_only=True)
class Config:
    model: str
    sessions: int = 32
    seconds: float = 300
    cache: int = 256
    threads: int = 2
    dtype: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    gpus: float = 0.0
    port: int = 8123
    json: Path | None = None


@dataclass
class Readings:
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    pinned_tokens: int = 0
    errors: list[str] = field(default_factory=list)
    memory_mib: list[dict[str, float]] = field(default_factory=list)


async def pin(client: httpx.AsyncClient, number: int) -> int:
    """Opens a session whose prefix is never evicted, and returns how many tokens it has."""
    body = {"session_id": f"bench-{number}", "pin_prefix": PREFIX}
    reply = await client.post("/v1/sessions", json=body)
    reply.raise_for_status()
    return int(reply.json()["sinks"])


async def stream(client: httpx.AsyncClient, number: int, until: float, readings: Readings) -> None:
    body = {
        "prompt": f"{PROMPT}{number}.",
        "session_id": f"bench-{number}",
        "max_tokens": None,
        "stream": True,
        "temperature": 0.8,
        "seed": number,
    }
    last: float | None = None
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            readings.errors.append(f"{reply.status_code} {await reply.aread()!r}")
            return
        async for line in reply.aiter_lines():
            now = time.perf_counter()
            if line.startswith("data: {"):
                data = json.loads(line[6:])
                if "error" in data:
                    readings.errors.append(line)
                    return
                if last is not None:
                    readings.gaps_s.append(now - last)
                last = now
                readings.tokens += 1
            if now > until:
                return


async def watch(until: float, readings: Readings) -> None:
    while time.perf_counter() < until:
        readings.memory_mib.append(resident_mib(PROCESSES))
        await asyncio.sleep(5)


async def measure(cfg: Config) -> Readings:
    readings = Readings()
    limits = httpx.Limits(max_connections=cfg.sessions + 1)
    base = f"http://127.0.0.1:{cfg.port}"
    async with httpx.AsyncClient(base_url=base, timeout=None, limits=limits) as client:
        for number in range(cfg.sessions):
            readings.pinned_tokens = await pin(client, number)
        until = time.perf_counter() + cfg.seconds
        tasks = [stream(client, number, until, readings) for number in range(cfg.sessions)]
        await asyncio.gather(watch(until, readings), *tasks)
    return readings


def summary(cfg: Config, readings: Readings) -> dict[str, object]:
    gaps = torch.tensor(readings.gaps_s).sort().values
    steady = readings.memory_mib[len(readings.memory_mib) // 5 :]
    return {
        "sessions": cfg.sessions,
        "seconds": cfg.seconds,
        "pinned_tokens": readings.pinned_tokens,
        "events": readings.tokens,
        "events_per_s": readings.tokens / cfg.seconds,
        "errors": readings.errors,
        "gap_ms": {
            str(q): float(gaps[min(int(q * len(gaps)), len(gaps) - 1)]) * 1e3
            for q in (0.5, 0.9, 0.99, 1.0)
        },
        "memory_mib": {
            name: {"after_a_fifth": steady[0][name], "end": steady[-1][name]} for name in PROCESSES
        },
    }


def main(cfg: Config) -> None:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as store:
        settings = LMSettings(
            model=cfg.model,
            store=store,
            sessions=cfg.sessions,
            cache=cfg.cache,
            threads=cfg.threads,
            dtype=cfg.dtype,
            gpus=cfg.gpus,
            max_requests=cfg.sessions + 8,
        )
        ray_serve.start(http_options={"port": cfg.port})
        ray_serve.run(build_app(settings), name="lm")
        report = summary(cfg, asyncio.run(measure(cfg)))
        print(json.dumps(report, indent=2))
        if cfg.json:
            cfg.json.write_text(json.dumps(report, indent=2) + "\n")
        ray_serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(tyro.cli(Config))
