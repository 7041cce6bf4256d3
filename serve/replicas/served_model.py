"""Which model an ingress replica prepares a request for.

During an update, replicas of two models run. The ingress prefers the model that it was deployed
with. But Serve replaces ingress and model replicas independently of one another, so for a while
there may be no replica of that model, or none any more. Then requests are prepared for a model
that is there, so that they are answered by one model from the first pixel to the reply.
"""

from __future__ import annotations

import asyncio
import time
from typing import Generic, TypeVar

from serve.ingress.errors import ApiError
from serve.ingress.model_handle import Card

LOOK_AGAIN_S = 0.2
"""Seconds until a request that names a model looks again for a replica of it."""

GONE_AFTER_S = 5.0
"""Seconds after its last answer for which a model may still have a replica that was not found."""


CardT = TypeVar("CardT", bound=Card)


def check_deployed(found: Card, deployed: Card, place: str) -> None:
    """Refuses what a replica has loaded if it is another model than its application was built for.

    Args:
        found: the model that the replica has loaded.
        deployed: the model when the application was built.
        place: where it was loaded from, as its setting, such as `artifact=DIR`.

    Raises:
        ValueError: they differ, so the replica would mix two models for good.
    """
    if found != deployed:
        raise ValueError(
            f"{place} holds another model here than when it was deployed. "
            "Give every model a folder of its own, and deploy that"
        )


class ServedModel(Generic[CardT]):
    """The model that the requests of one ingress replica are prepared for.

    Args:
        own: the model that this ingress was deployed with.

    Attributes:
        card: the model that answers now, as far as is known.
    """

    def __init__(self, own: CardT) -> None:
        self._own = self.card = own
        self._answered_at: float | None = None

    def named(self, name: str | None) -> CardT:
        """Returns the model of a request.

        Args:
            name: the model that the request names; None takes the one that answers now.

        Raises:
            ApiError: 404, no model has this name.
        """
        if name is None or name == self.card.name:
            return self.card
        if name == self._own.name and not self._is_gone():
            return self._own
        message = f"the model {name!r} does not exist; this server has {self.card.name!r}"
        raise ApiError(404, "model_not_found", message, param="model")

    def answered(self, card: CardT) -> None:
        """Notes that a replica of this model has answered."""
        if card == self._own:
            self.card, self._answered_at = card, time.monotonic()

    def saw(self, card: CardT) -> None:
        """Notes that of the model sought there is no replica, but that there is one of this."""
        self.card = card

    def _is_gone(self) -> bool:
        """Whether the own model has answered once and does so no more; before, it is starting."""
        last = self._answered_at
        return last is not None and time.monotonic() - last > GONE_AFTER_S

    async def instead(self, name: str | None, found: CardT) -> CardT:
        """Returns the model to prepare a refused request for, at once or after a while.

        Args:
            name: the model that the request names, if any.
            found: the model of a replica that refused the request.

        Raises:
            ApiError: 404, the request names a model that is no longer served.
        """
        self.saw(found)
        card = self.named(name)
        if card != found:
            await asyncio.sleep(LOOK_AGAIN_S)
        return card
