"""Serve's router of the language model: by the ring, and by the replica of an answer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import ActorDiedError
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve._private.request_router.common import PendingRequest

from helpers.waiting import LIMIT_S
from serve.lm.contract import is_session_id, key_of_replica
from serve.lm.router import SessionRouter

Route = Callable[..., Awaitable[str]]
DEPLOYMENT = DeploymentID(name="LanguageModel", app_name="a")


class Replica:
    max_ongoing_requests = 100

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)
        self.has_died = False

    async def get_queue_len(self, *, deadline_s: float) -> int:
        if self.has_died:
            raise ActorDiedError
        return 0


def routed(
    test: Callable[[SessionRouter, Route], Awaitable[None]],
) -> None:
    async def run() -> None:
        router = SessionRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
        router.initialize_state(num_fallback_replicas=0)
        numbers = itertools.count()

        async def route(key: str, *, is_retry: bool = False) -> str:
            number = str(next(numbers))
            told = RequestMetadata(number, number, session_id=key)
            choice = router._choose_replica_for_request(
                PendingRequest([], {}, told), is_retry=is_retry
            )
            chosen: Any = await asyncio.wait_for(choice, LIMIT_S)
            return str(chosen.replica_id.unique_id)

        await test(router, route)

    asyncio.run(run())


def test_an_answer_stays_with_its_replica_and_sessions_share_the_ring() -> None:
    async def test(router: SessionRouter, route: Route) -> None:
        one, two, three = (Replica(name) for name in ("one", "two", "three"))
        keys = [f"answer-{number}" for number in range(40)]
        router.update_replicas([one, two])  # type: ignore[list-item]
        before = {key: await route(key) for key in keys}
        router.update_replicas([one, two, three])  # type: ignore[list-item]
        after = {key: await route(key) for key in keys}
        moved = [key for key in keys if after[key] != before[key]]
        assert moved  # an answer that was found by its key would be lost
        assert {after[key] for key in moved} == {"three"}
        assert [await route(key_of_replica(name)) for name in ("one", "two")] == ["one", "two"]

        router.update_replicas([three])  # type: ignore[list-item]  # the others are drained
        assert {await route(key) for key in keys} == {"three"}
        assert [await route(key_of_replica(name)) for name in ("one", "two")] == ["one", "two"]
        router.on_replica_actor_died(one.replica_id)
        assert await route(key_of_replica("one")) == "three"  # it says that the answer is lost
        assert await route(key_of_replica("two")) == "two"
        router.update_replicas([])
        assert await route(key_of_replica("two")) == "two"  # even while no replica runs

    routed(test)


def test_a_replica_that_fails_a_call_is_asked_whether_it_lives() -> None:
    """By gRPC, Serve is not told that a replica has died: its calls only fail."""

    async def test(router: SessionRouter, route: Route) -> None:
        one, two = (Replica(name) for name in ("one", "two"))
        router.update_replicas([one, two])  # type: ignore[list-item]
        assert await route(key_of_replica("one"), is_retry=True) == "one"  # it was busy
        router.update_replicas([two])  # type: ignore[list-item]  # drained, as far as is known
        assert await route(key_of_replica("one"), is_retry=True) == "one"
        one.has_died = True
        assert await route(key_of_replica("one")) == "one"
        assert await route(key_of_replica("one"), is_retry=True) == "two"
        assert await route(key_of_replica("one")) == "two"

    routed(test)


def test_no_session_can_have_the_name_of_a_replica_s_key() -> None:
    assert not is_session_id(key_of_replica("abc"))
