"""Calls the planner from an ingress replica."""

from __future__ import annotations

import uuid
from typing import Any

from serve.ingress.errors import ApiError
from serve.planning.contract import Plan, PlanCard, PlanQuery, Prediction, PredictQuery
from serve.replicas.calls import ModelClient, Refusal


class PlannerClient(ModelClient[PlanCard]):
    """See `ModelClient`. A session's calls go to the same replica, as far as there is one."""

    async def plan(self, query: PlanQuery, card: PlanCard) -> Plan:
        """See `Planner.plan`; raises as `ModelClient.ask`, and what the planner objects to."""
        plan: Plan = await self._answer("plan", query, card, query.session)
        return plan

    async def predict(self, query: PredictQuery, card: PlanCard) -> Prediction:
        """See `Planner.predict`; raises as `plan`."""
        prediction: Prediction = await self._answer("predict", query, card, None)
        return prediction

    async def _answer(self, method: str, query: Any, card: PlanCard, session: str | None) -> Any:
        """A repeated call goes anywhere: it costs a session the start from its last plan at most,
        and the session's own replica is lost, silent or of another agent."""
        key = session

        async def call() -> Any | Refusal[PlanCard]:
            nonlocal key
            where, key = key or uuid.uuid4().hex, None
            return await self.model.call(method, query, card.fingerprint, session_id=where)

        found = await self.ask(call)
        if isinstance(found, ApiError):
            raise found
        return found
