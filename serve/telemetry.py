"""Sums the metrics of all replicas for `/metrics`.

A scrape through Serve's proxy reaches a random ingress replica, so the counters of a single replica
would seem to jump. Therefore every replica reports its registry to one `Telemetry` replica, and
`/metrics` returns the sum. Counters of replicas that have ended stay in the sum; gauges do not.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.util import metrics as ray_metrics

REPORT_EVERY_S = 5.0
STALE_AFTER_S = 20.0

LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Family:
    """One metric, with its samples by (sample name, labels)."""

    name: str
    documentation: str
    kind: str
    samples: dict[tuple[str, Labels], float]


def snapshot(registry: CollectorRegistry) -> list[Family]:
    """Returns the metrics of a registry as plain values, which can be sent to other processes."""
    return [
        Family(
            metric.name,
            metric.documentation,
            metric.type,
            {
                (sample.name, tuple(sorted(sample.labels.items()))): sample.value
                for sample in metric.samples
                if not sample.name.endswith("_created")
            },
        )
        for metric in registry.collect()
    ]


def render(sources: Iterable[list[Family]]) -> str:
    """Returns the sum of several replicas' metrics in Prometheus's text format."""
    merged: dict[str, Family] = {}
    for families in sources:
        for family in families:
            total = merged.setdefault(
                family.name, Family(family.name, family.documentation, family.kind, {})
            )
            for key, value in family.samples.items():
                total.samples[key] = total.samples.get(key, 0.0) + value
    return generate_latest(_Collected(merged.values())).decode()


class _Collected(CollectorRegistry):
    """A registry for `generate_latest` that only holds metrics made elsewhere."""

    def __init__(self, families: Iterable[Family]) -> None:
        super().__init__()
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            metric = Metric(family.name, family.documentation, family.kind)
            for (name, labels), value in family.samples.items():
                metric.add_sample(name, dict(labels), value)
            yield metric


class Telemetry:
    """Deployment of one replica that keeps the latest report of every other replica."""

    def __init__(self) -> None:
        self._reports: dict[str, tuple[float, list[Family]]] = {}

    async def report(self, source: str, families: list[Family]) -> None:
        """Replaces the last report of `source`; values are totals since the source started."""
        self._reports[source] = (time.monotonic(), families)

    async def scrape(self, source: str, families: list[Family]) -> str:
        """Stores a report as `report` does, and returns the sum over all sources as text."""
        await self.report(source, families)
        now = time.monotonic()
        return render(
            [f for f in families if f.kind != "gauge" or now - seen < STALE_AFTER_S]
            for seen, families in self._reports.values()
        )


class Reporter:
    """Sends a replica's metrics to `Telemetry` every few seconds, and its counters to Ray.

    Args:
        registry: the replica's metrics.
        telemetry: handle of the `Telemetry` deployment.
    """

    def __init__(self, registry: CollectorRegistry, telemetry: Any) -> None:
        self._registry = registry
        self._telemetry = telemetry
        self._source = uuid.uuid4().hex
        self._exported: dict[str, ray_metrics.Counter] = {}
        self._sent: dict[tuple[str, Labels], float] = {}
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def scrape(self) -> str:
        """Returns the metrics of all replicas as text, this replica's as of now."""
        text: str = await self._telemetry.scrape.remote(self._source, snapshot(self._registry))
        return text

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            families = snapshot(self._registry)
            self._export(families)
            try:
                await self._telemetry.report.remote(self._source, families)
            except (RayError, RayServeException):
                continue  # Telemetry restarts; the next report has the totals again

    def _export(self, families: list[Family]) -> None:
        """Adds the counters' increase since the last call to Ray's metrics, for its dashboards."""
        for family in families:
            if family.kind != "counter":
                continue
            for (name, labels), value in family.samples.items():
                gained = value - self._sent.get((name, labels), 0.0)
                if gained > 0:
                    tags = dict(labels)
                    counter = self._exported.setdefault(
                        name,
                        ray_metrics.Counter(name, family.documentation, tag_keys=tuple(tags)),
                    )
                    counter.inc(gained, tags=tags)
                    self._sent[name, labels] = value
