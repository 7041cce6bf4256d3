"""How long a replica is waited for that neither answers nor fails.

When a process dies, Ray says so at once. When a machine or its network goes, Ray says so after
about a minute, which is as long as a request may take. Until then the replica is only silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import RayActorError

Result = TypeVar("Result")


class ReplicaSilent(Exception):
    """A replica has not answered for so long that it counts as lost."""


async def first_answer(
    call: Callable[[], Awaitable[Result]], *, calls: int, silence_s: float
) -> Result:
    """Returns the first answer to a call that is safe to repeat.

    The call is made again when a replica dies, and beside the first one when it is silent. A silent
    call is not given up, because under load its answer may still come.

    Args:
        call: makes the call.
        calls: how often it is made at most.
        silence_s: seconds without an answer after which it is made again.

    Raises:
        Exception: that of the last call, if no call is answered.
    """
    waiting: set[asyncio.Future[Result]] = set()
    failure: BaseException | None = None
    try:
        for number in range(1, calls + 1):
            waiting.add(asyncio.ensure_future(call()))
            patience = silence_s if number < calls else None
            while waiting:
                done, waiting = await asyncio.wait(
                    waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break  # all are silent: ask another
                for each in done:
                    failure = each.exception()
                    if failure is None:
                        return each.result()
                if isinstance(failure, RayActorError):
                    break
                if not waiting and failure is not None:
                    raise failure
        while waiting:  # the last one has failed, an earlier one is silent
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for each in done:
                if each.exception() is None:
                    return each.result()
        assert failure is not None
        raise failure
    finally:
        for each in waiting:
            each.cancel()


async def while_alive(
    call: Awaitable[Result], ping: Callable[[], Awaitable[object]], *, silence_s: float
) -> Result:
    """Returns the answer to a call that may take long, as long as its replica answers pings.

    Args:
        call: the call.
        ping: calls the same replica for something that it answers at once. May raise
            `ReplicaSilent` to say that the replica does not work on the call.
        silence_s: seconds without an answer, to the call and then to the ping.

    Raises:
        ReplicaSilent: the replica answers neither, or does not know of the call.
    """
    answer = asyncio.ensure_future(call)
    try:
        while not (await asyncio.wait({answer}, timeout=silence_s))[0]:
            try:
                async with asyncio.timeout(silence_s):
                    await ping()
            except (TimeoutError, ReplicaSilent) as error:
                if not answer.done():
                    raise ReplicaSilent(f"no answer within {2 * silence_s:g} s") from error
        return answer.result()
    finally:
        answer.cancel()
