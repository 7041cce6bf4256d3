"""How HTTP replicas reach the model: in replicas of its own, or in their own process."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Protocol

from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

READY_CACHE_S = 1.0


class Card(Protocol):
    """What an application knows of a model."""

    @property
    def name(self) -> str:
        """Its name in requests."""

    @property
    def fingerprint(self) -> str:
        """Digest of everything that makes it another model."""


class ModelHandle(Protocol):
    """The model, as an HTTP replica calls it, wherever it runs."""

    @property
    def repeats(self) -> bool:
        """Whether a call that fails or is silent may be made again, to another replica."""

    async def call(self, method: str, *args: Any, session_id: str = "") -> Any:
        """Calls a method of a model replica.

        Args:
            method: its name.
            args: its arguments.
            session_id: calls with the same one go to the same replica, as long as it is there.
        """

    async def is_ready(self) -> bool | str:
        """Returns whether requests can be served, or what else there is to say if they can."""


class DeployedModel:
    """A model with a deployment of its own.

    Args:
        handle: Serve's handle of that deployment, which has `describe`.
        name: the deployment's name.
        own: the model that this ingress was deployed with; None if it takes any.
    """

    repeats = True

    def __init__(self, handle: Any, name: str, own: Card | None = None) -> None:
        self.handle, self._name, self._own = handle, name, own
        self._methods: dict[str, Any] = {}
        self._checked_at = -READY_CACHE_S
        self._ready: bool | str = False

    async def call(self, method: str, *args: Any, session_id: str = "") -> Any:
        """See `ModelHandle`."""
        if session_id:
            bound = self.handle.options(method_name=method, session_id=session_id)
        elif (bound := self._methods.get(method)) is None:
            bound = self._methods[method] = getattr(self.handle, method)
        return await bound.remote(*args)

    async def is_ready(self) -> bool | str:
        """Tells whether a model replica is running, looked up at most once a second.

        Serve's controller is asked first, because under load a call to the model would wait behind
        the requests, and a busy model is ready. But the controller forgets the deployments of an
        application whose latest config it could not build, although they go on serving. So if it
        says no, a replica's own answer counts. The answer also tells which model it serves.
        """
        if time.monotonic() - self._checked_at >= READY_CACHE_S:
            self._checked_at = time.monotonic()
            self._ready = await self._look()
        return self._ready

    async def _look(self) -> bool | str:
        found, listed = await asyncio.gather(self._ask(), asyncio.to_thread(self._is_listed))
        if found is None:
            return listed
        if self._own is None or found.fingerprint == self._own.fingerprint:
            return True
        return (
            f"ok, but a replica serves {_told(found)}, and this one was deployed with "
            f"{_told(self._own)}: an update goes on, or new replicas do not start"
        )

    async def _ask(self) -> Card | None:
        try:
            async with asyncio.timeout(READY_CACHE_S):
                card: Card = await self.call("describe")
        except (TimeoutError, RayError, RayServeException):
            return None
        return card

    def _is_listed(self) -> bool:
        app_name = ray_serve.get_replica_context().app_name
        application = ray_serve.status().applications.get(app_name)
        deployment = application and application.deployments.get(self._name)
        # Annotated as an enum, but the controller sends plain strings.
        states: dict[Any, int] = dict(deployment.replica_states) if deployment else {}
        return states.get("RUNNING", 0) > 0


def _told(card: Card) -> str:
    return f"{card.name} ({card.fingerprint[:12]})"


@dataclass(frozen=True)
class InProcess:
    """In the place of a deployment: says that each HTTP replica holds the model itself.

    Attributes:
        kind: the class that the deployment would have.
    """

    kind: type[Any]


class LocalModel:
    """A model in this process. It lives and dies with the HTTP replica, so it is always ready.

    Args:
        replica: what would be a replica of a deployment of its own.
    """

    repeats = False

    def __init__(self, replica: Any) -> None:
        self.replica = replica

    async def call(self, method: str, *args: Any, session_id: str = "") -> Any:
        """See `ModelHandle`."""
        return await getattr(self.replica, method)(*args)

    async def is_ready(self) -> bool:
        """See `ModelHandle`."""
        return True
