"""Which model an ingress replica prepares requests for, while an update replaces one by another.

A prompt becomes tokens in the ingress, by the tokenizer and the chat template of one model. The
replica that a request reaches refuses tokens that were made for another; then the request is
prepared anew, for the model of that replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from models.sink_lm.checkpoints.tokenizer import load_tokenizer
from serve.ingress.errors import ApiError
from serve.lm.contract import LMCard
from serve.lm.frontend.client import LMClient, OtherModel
from serve.lm.frontend.service import LanguageService
from serve.lm.settings import LMSettings

TRIES = 20
"""Replicas that a request is offered to. One that names no model is taken by the second at most;
one that names a model looks for a replica of it."""
PAUSE_S = 0.1
LOOK_S = 1.0
KEPT = 2
"""Models whose tokenizers are kept."""

Result = TypeVar("Result")
log = logging.getLogger(__name__)


class ServedModels:
    """The models that were met, each with what checks and tokenizes requests for it.

    Args:
        settings: the ingress's limits.
        client: calls the replicas.
        service: of the model that is met first.
    """

    def __init__(self, settings: LMSettings, client: LMClient, service: LanguageService) -> None:
        self.settings, self._client = settings, client
        self._known = {service.card.release: service}
        self._lock = asyncio.Lock()

    @classmethod
    async def find(cls, settings: LMSettings, client: LMClient) -> ServedModels:
        """Waits for a replica and begins with its model."""
        service = await asyncio.to_thread(_service, settings, await client.describe())
        return cls(settings, client, service)

    @property
    def service(self) -> LanguageService:
        """That of the model that was met last."""
        return next(reversed(self._known.values()))

    async def meet(self, card: LMCard) -> None:
        """Makes the model of a replica the one that requests are prepared for."""
        async with self._lock:
            service = self._known.pop(card.release, None)
            if service is None:
                service = await asyncio.to_thread(_service, self.settings, card)
            self._known[card.release] = service
            while len(self._known) > KEPT:
                del self._known[next(iter(self._known))]

    async def look(self) -> None:
        """Asks a replica, whichever, for its model; if none answers, nothing changes."""
        with contextlib.suppress(TimeoutError, RayError, RayServeException):
            async with asyncio.timeout(LOOK_S):
                await self.meet(await self._client.describe())

    async def run(
        self, name: str | None, attempt: Callable[[LanguageService, str], Awaitable[Result]]
    ) -> Result:
        """Prepares and sends a request, again as long as it reaches replicas of another model.

        Args:
            name: the model that the request names; None takes any.
            attempt: prepares the request by a service, and sends it to the replica of a key, which
                is used for requests without a session.

        Raises:
            ApiError: the request is refused, or no replica of its model was found.
        """
        key = uuid.uuid4().hex
        for tried in range(TRIES):
            try:
                return await attempt(self._named(name), key)
            except OtherModel as other:
                await self._meet_other(other)
            except ApiError as error:
                if error.code != "model_not_found" or name != self.settings.name:
                    raise
                await self.look()  # its replicas are starting
            if name not in (None, self.service.card.name):
                key = uuid.uuid4().hex  # leads to another replica
                await asyncio.sleep(PAUSE_S if tried else 0)
        return await attempt(self.service, key)

    async def _meet_other(self, other: OtherModel) -> None:
        try:
            await self.meet(other.card)
        except (OSError, ValueError) as error:
            log.exception("%s: its tokenizer cannot be loaded here", other.card.model)
            raise other from error

    def _named(self, name: str | None) -> LanguageService:
        """Returns the service of a name where it is known, else that of the model met last."""
        named = [each for each in self._known.values() if each.card.name == name]
        return named[-1] if named else self.service


def _service(settings: LMSettings, card: LMCard) -> LanguageService:
    return LanguageService(settings, card, load_tokenizer(card.model))
