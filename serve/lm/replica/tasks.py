"""How a replica runs its methods: named, to their end, in the background, under a lock."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from models.sink_lm.network.cache import NoFreeSlab
from serve.ingress.errors import ApiError
from serve.lm.replica.refusals import no_slab

Self = TypeVar("Self")
Args = ParamSpec("Args")
Result = TypeVar("Result")
Method = Callable[Concatenate[Self, Args], Coroutine[Any, Any, Result]]

log = logging.getLogger(__name__)
_running: set[asyncio.Task[Any]] = set()  # the event loop itself holds its tasks weakly


def in_full(
    method: Method[Self, Args, Result],
) -> Callable[Concatenate[Self, Args], Awaitable[Result | ApiError]]:
    """Makes a method run to its end even if its caller goes away.

    When a client goes away, Serve cancels the method at its next await, perhaps half way through
    moving a session from one place to another. With this decorator only the waiting is cancelled.
    Refusals are returned instead of raised (see `serve.lm.contract`); this is the one place that
    turns them.
    """

    @wraps(method)
    async def called(self: Self, /, *args: Args.args, **kwargs: Args.kwargs) -> Result | ApiError:
        task = in_background(_refused(method(self, *args, **kwargs)))
        return await asyncio.shield(task)

    return called


class CallsInProgress:
    """Names of the calls that a replica is working on."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Counts a call as in progress for the length of the block."""
        self._names.add(name)
        try:
            yield
        finally:
            self._names.discard(name)


def with_name(method: Callable[..., Awaitable[Result]]) -> Callable[..., Awaitable[Result]]:
    """Gives a method the keyword `call_id`, under which its replica's `calls` has it meanwhile."""

    @wraps(method)
    async def called(self: Any, /, *args: Any, call_id: str = "") -> Result:
        with self.calls.named(call_id):
            return await method(self, *args)

    return called


def in_background(work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
    """Runs a coroutine as a task; its exception is logged even if nobody waits for it."""
    task = asyncio.get_running_loop().create_task(work)
    _running.add(task)
    task.add_done_callback(_done)
    return task


def _done(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and task.exception() is not None:
        log.error("%s failed", task.get_coro(), exc_info=task.exception())


async def _refused(work: Coroutine[Any, Any, Result]) -> Result | ApiError:
    try:
        return await work
    except ApiError as error:
        return error
    except NoFreeSlab:
        return no_slab()


async def io(work: Callable[[], Result]) -> Result:
    """Runs blocking input or output in a thread."""
    return await asyncio.to_thread(work)


class Locks:
    """Locks by name, each for as long as somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._locks)

    def get(self, name: str) -> asyncio.Lock:
        """Returns the lock of a name, the same one for everybody who asks while it is in use."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock
