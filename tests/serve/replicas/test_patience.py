"""Replicas that die, refuse or say nothing, and how long they are waited for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from ray.exceptions import ActorDiedError

from serve.replicas.patience import ReplicaSilent, first_answer, while_alive

SILENCE_S = 0.1


class Replicas:
    """Each call gets the next behaviour: to answer once there have been so many calls, to be
    `silent`, or an error."""

    def __init__(self, *behaviours: int | str | Exception) -> None:
        self.behaviours = list(behaviours)
        self.calls = self.left = 0

    async def call(self) -> int:
        number, behaviour = self.calls, self.behaviours[self.calls]
        self.calls += 1
        try:
            if isinstance(behaviour, Exception):
                raise behaviour
            while behaviour == "silent" or self.calls < int(behaviour):
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.left += 1
            raise
        return number


def ask(replicas: Replicas) -> int:
    return asyncio.run(first_answer(replicas.call, calls=3, silence_s=SILENCE_S))


@pytest.mark.parametrize(
    ("behaviours", "answered_by", "calls"),
    [
        ((1,), 0, 1),
        ((ActorDiedError(), ActorDiedError(), 3), 2, 3),
        (("silent", 2), 1, 2),
        (("silent", ActorDiedError(), 3), 2, 3),
        ((3, "silent", "silent"), 0, 3),  # slow and not dead: its answer counts
        ((3, ActorDiedError(), ActorDiedError()), 0, 3),
        ((2, ValueError("full")), 0, 2),  # the second is refused: the first goes on
    ],
)
def test_a_lost_replica_costs_one_more_call(
    behaviours: tuple[int | str | Exception, ...], answered_by: int, calls: int
) -> None:
    replicas = Replicas(*behaviours)
    began = time.monotonic()
    assert ask(replicas) == answered_by
    assert replicas.calls == calls
    assert time.monotonic() - began < 30  # and not the minute that Ray takes
    assert replicas.left == sum(b == "silent" for b in behaviours)


def test_what_no_replica_answers_fails_as_the_last_one_did() -> None:
    with pytest.raises(ActorDiedError):
        ask(Replicas(*[ActorDiedError()] * 3))
    refused = Replicas(ValueError("full"), 1)
    with pytest.raises(ValueError, match="full"):
        ask(refused)
    assert refused.calls == 1  # a refusal is an answer


def slow(seconds: float) -> Callable[[], Awaitable[object]]:
    return lambda: asyncio.sleep(seconds)


def test_a_long_call_is_waited_for_while_its_replica_answers_pings() -> None:
    async def wait(call: Awaitable[str], ping: Callable[[], Awaitable[object]]) -> str:
        return await while_alive(call, ping, silence_s=SILENCE_S)

    assert asyncio.run(wait(asyncio.sleep(0.35, "done"), slow(0))) == "done"
    assert asyncio.run(wait(asyncio.sleep(0, "at once"), slow(60))) == "at once"
    with pytest.raises(ReplicaSilent):
        asyncio.run(wait(asyncio.sleep(60, "late"), slow(60)))
