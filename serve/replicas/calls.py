"""Calls a model's replicas from an ingress replica, again if one dies or has another model."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve.ingress.errors import queue_full, server_error
from serve.ingress.model_handle import Card, ModelHandle
from serve.replicas.patience import first_answer

ATTEMPTS = 3
"""Calls made for one request when replicas die or are silent while they serve it."""

MATCHING = 12
"""Calls made to find a replica of the model that a request was prepared for. Serve's router takes
one of the replicas at random, so with one of two it is found but for once in 4,096 times."""

LONGEST_PAUSE_S = 0.05

CardT = TypeVar("CardT", bound=Card)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Refusal(Generic[CardT]):
    """What a replica returns for inputs that were prepared for another model.

    It is returned and not raised: raised, it would arrive wrapped in an error of Ray's and be
    logged as a crash.

    Attributes:
        card: the model that the replica serves.
    """

    card: CardT


class OtherModel(Exception, Generic[CardT]):
    """Inputs were prepared for a model that no replica was found to serve.

    Args:
        card: a model that a replica does serve.
    """

    def __init__(self, card: CardT) -> None:
        super().__init__(f"a replica serves the model {card.name!r} ({card.fingerprint:.12})")
        self.card = card


class ModelClient(Generic[CardT]):
    """Calls a model and turns its failures into API errors.

    Args:
        model: how it is called.
        own: the model that this ingress was deployed with.
        silence_s: seconds without an answer after which another replica is asked, too.
    """

    def __init__(self, model: ModelHandle, own: CardT, *, silence_s: float = 15.0) -> None:
        self.model, self._own, self._silence_s = model, own, silence_s

    async def ask(self, call: Callable[[], Awaitable[Result | Refusal[CardT]]]) -> Result:
        """Returns the answer of a replica that serves the model which a call names.

        Args:
            call: calls any replica. It is repeated if a replica dies or is silent, so it must be
                safe to repeat.

        Raises:
            ApiError: 429 if the deployment's queue is full, 503 if there is no replica.
            OtherModel: no replica of the model was found, or one of this ingress's own model.
        """
        tried = 0
        while isinstance(found := await self._call(call), Refusal):
            tried += 1
            if found.card == self._own or tried == MATCHING:
                raise OtherModel(found.card)
            await asyncio.sleep(min(LONGEST_PAUSE_S, 0.005 * tried))
        return found

    async def _call(self, call: Callable[[], Awaitable[Result]]) -> Result:
        try:
            attempts = ATTEMPTS if self.model.repeats else 1
            return await first_answer(call, calls=attempts, silence_s=self._silence_s)
        except BackPressureError as error:
            raise queue_full() from error
        except (RayActorError, DeploymentUnavailableError) as error:
            message = "no model replica could take the request"
            raise server_error(503, "no_replica", message) from error
