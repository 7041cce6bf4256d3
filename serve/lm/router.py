"""Which replica of the language model a call goes to.

A call that begins something goes by the name of its session (or by a name made up for it) to a
place on a ring, so that a session stays with its replica as far as the set of replicas allows. A
call about something in progress goes to the replica where it is, whatever has become of the ring,
and also while Serve drains that replica.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import ActorDiedError, RayError
from ray.serve._private.common import ReplicaID
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from serve.lm.contract import named_replica

REFUSED_S = 0.05
"""Seconds until a replica that has refused a call gets it again."""
ANSWERED_S = 1.0
"""Seconds for which a replica is asked whether it lives."""
MOST_DRAINING = 64


class SessionRouter(ConsistentHashRouter):
    """Serve's ring of replicas, and besides it the replicas that calls name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._draining: dict[str, RunningReplica] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Takes over the running replicas; those that run no more may still be finishing."""
        before = self.curr_replicas
        super().update_replicas(replicas)
        for replica_id, replica in before.items():
            if replica_id not in self.curr_replicas:
                self._draining[replica_id.unique_id] = replica
        while len(self._draining) > MOST_DRAINING:
            del self._draining[next(iter(self._draining))]

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forgets a replica; calls that name it go by the ring, to one that answers `lost`."""
        super().on_replica_actor_died(replica_id)
        self._draining.pop(replica_id.unique_id, None)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        replica = self._named(pending_request)
        if replica is None:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        if is_retry:
            await asyncio.sleep(REFUSED_S)
            if await _has_died(replica):
                self.on_replica_actor_died(replica.replica_id)
                return await super()._choose_replica_for_request(pending_request, is_retry=True)
        return replica

    def _named(self, pending_request: PendingRequest) -> RunningReplica | None:
        """Returns the replica that a call names, if it is known and has not died."""
        name = named_replica(pending_request.metadata.session_id)
        if name is None:
            return None
        running = {each.unique_id: replica for each, replica in self.curr_replicas.items()}
        return running.get(name) or self._draining.get(name)


async def _has_died(replica: RunningReplica) -> bool:
    """Asks Ray, because a failed call by gRPC does not tell; without an answer it may live."""
    try:
        async with asyncio.timeout(ANSWERED_S):
            await replica.get_queue_len(deadline_s=ANSWERED_S)
    except ActorDiedError:
        return True
    except (RayError, TimeoutError):
        return False
    return False
