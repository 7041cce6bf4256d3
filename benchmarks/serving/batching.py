"""`serve.replicas.batching.Batcher` against Ray's `@serve.batch`, on a simulated model.

    python benchmarks/serving/batching.py    # about 5 minutes, no Ray cluster, almost no CPU

The model only sleeps: a call takes `a` seconds for every shape in it and `b` seconds an item, one
call at a time, as a forward pass does. Clients ask again after a random pause, as HTTP and decoding
make them. The two take turns within every case, three rounds of each, and the table has the
medians over the rounds. Results: benchmarks/serving/serving.md.
"""

from __future__ import annotations

import asyncio
import pathlib
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__" and not __package__:  # so that it runs from an uninstalled checkout
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent.parent)

import ray.serve.batching as ray_batching
from ray import serve as ray_serve

from serve.replicas.batching import Batcher

BATCH_SIZE = 32
SECONDS, ROUNDS = 2.0, 3
CPU, GPU = (0.005, 0.05), (0.008, 0.0003)
CLIP_ITEMS = 8
"""A clip costs as much as this many images."""

KINDS = {
    "Batcher, 2 ms": ("Batcher", 0.002),
    "@serve.batch, 0 ms": ("@serve.batch", 0.0),
    "@serve.batch, 2 ms": ("@serve.batch", 0.002),
    "@serve.batch, 10 ms": ("@serve.batch", 0.010),
}
"""Name in the table: which of the two, and how long the first item waits for others."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A load.

    Attributes:
        name: for the table.
        model: seconds for every shape of a call, and for every item.
        clients: how many ask at the same time.
        clips: share of the items that are clips and not images.
        impatient: share of the requests whose client leaves after at most 50 ms.
    """

    name: str
    model: tuple[float, float]
    clients: int
    clips: float = 0.0
    impatient: float = 0.0


CASES = [
    Case(name="CPU, 1 client", model=CPU, clients=1),
    Case(name="CPU, 8 clients", model=CPU, clients=8),
    Case(name="CPU, 64 clients", model=CPU, clients=64),
    Case(name="GPU, 1 client", model=GPU, clients=1),
    Case(name="GPU, 8 clients", model=GPU, clients=8),
    Case(name="GPU, 64 clients", model=GPU, clients=64),
    Case(name="GPU, 64 clients, half clips", model=GPU, clients=64, clips=0.5),
    Case(name="GPU, 64 clients, a third leaves", model=GPU, clients=64, impatient=1 / 3),
]


@dataclass
class Outcome:
    """What one run measured.

    Attributes:
        latencies_ms: of the requests that were answered.
        sizes: of the batches.
        rate: answers a second.
        unread: items that the model computed although their client had left before the call.
    """

    latencies_ms: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    rate: float = 0.0
    unread: int = 0


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


async def simulate(kind: str, wait_s: float, case: Case, seed: int) -> Outcome:
    outcome, left = Outcome(), set[int]()
    free = asyncio.Lock()
    per_shape_s, per_item_s = case.model

    async def run(items: list[tuple[int, int]]) -> list[int]:
        async with free:
            outcome.sizes.append(len(items))
            outcome.unread += sum(number in left for number, _ in items)
            work = len({cost for _, cost in items}) * per_shape_s
            await asyncio.sleep(work + per_item_s * sum(cost for _, cost in items))
        return [number for number, _ in items]

    submit: Callable[[tuple[int, int]], Awaitable[int]]
    if kind == "@serve.batch":
        decorate: Any = ray_serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=wait_s)
        submit = decorate(run)
    else:
        submit = Batcher(run, batch_size=BATCH_SIZE, max_wait_s=wait_s).submit
    rng, began, asked = random.Random(seed), time.perf_counter(), 0

    async def client() -> None:
        nonlocal asked
        while time.perf_counter() < began + SECONDS:
            await asyncio.sleep(rng.uniform(0.002, 0.030))
            asked += 1
            number, cost = asked, CLIP_ITEMS if rng.random() < case.clips else 1
            patience_s = rng.uniform(0, 0.05) if rng.random() < case.impatient else None
            started = time.perf_counter()
            try:
                async with asyncio.timeout(patience_s):
                    assert await submit((number, cost)) == number
                outcome.latencies_ms.append((time.perf_counter() - started) * 1e3)
            except TimeoutError:
                left.add(number)

    await asyncio.gather(*(client() for _ in range(case.clients)))
    outcome.rate = len(outcome.latencies_ms) / (time.perf_counter() - began)
    return outcome


def row(case: Case, name: str, outcomes: list[Outcome]) -> str:
    def median(of: Callable[[Outcome], float]) -> float:
        return statistics.median(map(of, outcomes))

    percentiles = [
        median(lambda o, at=at: statistics.quantiles(o.latencies_ms, n=100)[at])  # type: ignore[misc]
        for at in (49, 98)
    ]
    size = median(lambda outcome: statistics.mean(outcome.sizes))
    rate, unread = median(lambda outcome: outcome.rate), sum(o.unread for o in outcomes)
    return (
        f"| {case.name} | {name} | {rate:.0f} | {percentiles[0]:.1f} | {percentiles[1]:.1f} "
        f"| {size:.1f} | {unread} |"
    )


def main() -> None:
    """Prints one row per case and batcher."""
    outside_a_replica()
    print("| load | batcher, wait | answers/s | p50 ms | p99 ms | mean batch | unread |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        found: dict[str, list[Outcome]] = {name: [] for name in KINDS}
        for seed in range(ROUNDS):
            for name, (kind, wait_s) in KINDS.items():
                found[name].append(asyncio.run(simulate(kind, wait_s, case, seed)))
        for name, outcomes in found.items():
            print(row(case, name, outcomes), flush=True)


if __name__ == "__main__":
    main()
