"""`serve.embeddings.replica.batching.Batcher` against Ray's `@serve.batch`, on a model that only sleeps.

    python benchmarks/serving/batching.py         # about 80 s, no Ray cluster needed, almost no CPU

A model call of n items takes a + b*n seconds, one call at a time; clients ask again after a random
pause, as HTTP and decoding make them. Results: docs/serving.md.
"""

from __future__ import annotations

import asyncio
import pathlib
import random
import sys
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__" and not __package__:  # so that it runs from an uninstalled checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[2])

import ray.serve.batching as ray_batching
from ray import serve as ray_serve

from serve.embeddings.replica.batching import Batcher

MODELS = {"5 ms + 50 ms an item (CPU)": (0.005, 0.05), "8 ms + 0.3 ms an item": (0.008, 0.0003)}
BATCH_SIZE = 32


class _NoMetric:
    """Stands in for Ray's metrics, which want a running Ray."""

    def set(self, *_: object, **__: object) -> None: ...
    def observe(self, *_: object, **__: object) -> None: ...
    def inc(self, *_: object, **__: object) -> None: ...


def outside_a_replica() -> None:
    """Lets `@serve.batch` run without Serve (Ray 2.60's internals)."""
    config = SimpleNamespace(max_ongoing_requests=1000)
    ray_serve.get_replica_context = lambda: SimpleNamespace(_deployment_config=config)
    for name in ("Gauge", "Counter", "Histogram"):
        setattr(ray_batching, name, lambda *_, **__: _NoMetric())


async def simulate(
    kind: str, model: tuple[float, float], clients: int, wait_s: float, seconds: float
) -> tuple[float, float]:
    """Returns items per second and the mean batch size."""
    sizes: list[int] = []
    free = asyncio.Lock()

    async def run(items: list[int]) -> list[int]:
        async with free:
            sizes.append(len(items))
            await asyncio.sleep(model[0] + model[1] * len(items))
        return items

    submit: Callable[[int], Awaitable[int]]
    if kind == "@serve.batch":
        decorate: Any = ray_serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=wait_s)
        submit = decorate(run)
    else:
        submit = Batcher(run, batch_size=BATCH_SIZE, max_wait_s=wait_s).submit
    rng, began, done = random.Random(0), time.perf_counter(), 0

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < began + seconds:
            await asyncio.sleep(rng.uniform(0.002, 0.030))
            await submit(1)
            done += 1

    await asyncio.gather(*(client() for _ in range(clients)))
    return done / (time.perf_counter() - began), sum(sizes) / len(sizes)


def main() -> None:
    """Prints one row per case."""
    outside_a_replica()
    print(
        "| model | clients | wait ms | batcher | items/s | mean batch |\n|---|---|---|---|---|---|"
    )
    for name, model in MODELS.items():
        for clients in (8, 32, 64):
            for wait_s in (0.002, 0.010):
                for kind in ("@serve.batch", "Batcher"):
                    rate, size = asyncio.run(simulate(kind, model, clients, wait_s, 3.0))
                    row = f"{name} | {clients} | {wait_s * 1e3:.0f} | {kind} | {rate:.0f} | {size:.1f}"
                    print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
