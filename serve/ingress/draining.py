"""Whether Serve is stopping this replica.

Serve tells a replica nothing when it begins to drain it: it sends no new requests, waits
`graceful_shutdown_timeout_s` for those in progress, and then kills the process. A request that ends
by itself is not hurt. A stream is, so its replica asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ray import serve as ray_serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeInstanceDetails

LOOK_S = 2.0
"""Seconds between two looks."""


async def drained_from_now(is_needed: Callable[[], bool]) -> None:
    """Returns when Serve has begun to stop this replica.

    Args:
        is_needed: whether anybody would be told; while nobody would, Serve is not asked.
    """
    while not (is_needed() and await asyncio.to_thread(_is_stopping)):
        await asyncio.sleep(LOOK_S)


def _is_stopping() -> bool:
    """Asks the controller, as `ray_serve.status()` does, which leaves the replicas' names out."""
    context, client = ray_serve.get_replica_context(), _get_global_client()
    assert client is not None  # it raises if there is no controller
    details = ServeInstanceDetails(**client.get_serve_details())
    application = details.applications.get(context.app_name)
    deployment = application and application.deployments.get(context.deployment)
    states = {
        each.replica_id: each.state.value for each in (deployment.replicas if deployment else ())
    }
    return states.get(context.replica_tag) == "STOPPING"
