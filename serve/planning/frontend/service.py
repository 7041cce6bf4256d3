"""Turns the body of a request into the body of its reply, without HTTP or Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from serve.embeddings.encoding import encode_values
from serve.ingress.bodies import RequestModel, parse_body
from serve.ingress.errors import ApiError
from serve.ingress.json_text import to_json
from serve.planning.contract import (
    Floats,
    Imagined,
    Pixels,
    Plan,
    PlanCard,
    PlanQuery,
    Prediction,
    PredictQuery,
)
from serve.planning.frontend.frames import FrameReader
from serve.planning.frontend.schemas import PlanRequest, PredictRequest
from serve.planning.settings import PlanningSettings
from serve.replicas.calls import OtherModel
from serve.replicas.served_model import ServedModel

Body = TypeVar("Body", bound=RequestModel)
Answer = TypeVar("Answer")
_PARSE_INLINE_BYTES = 262_144
"""Up to this size a body is parsed in the event loop: passing it to a thread would cost more."""
_TASK = ("steps", "budget", "method", "caution")
"""Fields of a request that go to the task as they are."""


class Client(Protocol):
    """Asks a planner, wherever that runs."""

    async def plan(self, query: PlanQuery, card: PlanCard) -> Plan:
        """Raises `OtherModel` if no replica is found that serves this card's agent."""

    async def predict(self, query: PredictQuery, card: PlanCard) -> Prediction:
        """As `plan`."""


class PlanningService:
    """Answers requests for plans and predictions.

    Args:
        settings: the limits.
        model: the agent that requests are prepared for.
        client: asks planners.
    """

    def __init__(
        self, settings: PlanningSettings, model: ServedModel[PlanCard], client: Client
    ) -> None:
        self.settings, self.model, self.created = settings, model, int(time.time())
        self._client = client
        self._threads = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._frames = FrameReader(settings, self._threads)

    async def plan(self, body: bytes) -> bytes:
        """Returns the reply's body for the body of one `POST /v1/plan`; raises `ApiError`."""
        request = await self._parse(body, PlanRequest)

        async def ask(card: PlanCard) -> Plan:
            task = self._task(request, card)
            seen = _listed(request.observation, "observation")
            if not 1 <= len(seen) <= card.history:
                raise _invalid("observation", f"1 to {card.history} frames, got {len(seen)}")
            wanted = [*seen, (request.goal, "goal")]
            *frames, goal = await self._frames.read_all(wanted, card.preprocessing)
            query = PlanQuery(
                observation_hHWC=_filled(frames, card.history),
                goal_HWC=goal,
                session=request.session,
                task=task,
            )
            return await self._client.plan(query, card)

        card, plan = await self._by_one_model(request.model, ask)
        return to_json(_plan_reply(request, card, plan))

    async def predict(self, body: bytes) -> bytes:
        """Returns the reply's body for the body of one `POST /v1/predict`; raises `ApiError`."""
        request = await self._parse(body, PredictRequest)
        frames = _listed(request.frames, "frames")
        goals = [] if request.goal is None else [(request.goal, "goal")]

        async def ask(card: PlanCard) -> Prediction:
            actions_KA = self._actions(request, card, frames=len(frames))
            pixels = await self._frames.read_all(frames + goals, card.preprocessing)
            query = PredictQuery(
                frames_THWC=_filled(pixels[: len(frames)], card.history),
                actions_KA=actions_KA,
                goal_HWC=pixels[-1] if goals else None,
            )
            return await self._client.predict(query, card)

        card, prediction = await self._by_one_model(request.model, ask)
        return to_json(_prediction_reply(request, card, prediction))

    async def close(self) -> None:
        """Releases threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _parse(self, body: bytes, kind: type[Body]) -> Body:
        if len(body) <= _PARSE_INLINE_BYTES:
            return parse_body(body, kind)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, parse_body, body, kind)

    async def _by_one_model(
        self, name: str | None, ask: Callable[[PlanCard], Awaitable[Answer]]
    ) -> tuple[PlanCard, Answer]:
        """Asks for one agent, and again if its replicas have gone; returns that agent, too."""
        card = self.model.named(name)
        while True:
            try:
                answer = await ask(card)
            except OtherModel as other:
                card = await self.model.instead(name, other.card)
                continue
            self.model.answered(card)
            return card, answer

    def _task(self, request: PlanRequest, card: PlanCard) -> dict[str, Any]:
        """Returns the fields of the task that the request sets, within the server's limits."""
        most = self.settings.max_budget
        if request.budget is not None and request.budget > most:
            raise _invalid("budget", f"at most {most} imagined steps, got {request.budget}")
        if request.method is not None and request.method not in card.methods:
            raise _invalid("method", f"one of {', '.join(card.methods)}, not {request.method!r}")
        if request.zones and len(request.zones) > self.settings.max_zones:
            raise _invalid("zones", f"at most {self.settings.max_zones}, got {len(request.zones)}")
        if request.zones and not card.reads_places:
            raise _invalid("zones", "this model reads no places, so it keeps out of none")
        given = {name: getattr(request, name) for name in _TASK}
        task = {name: value for name, value in given.items() if value is not None}
        if request.zones is not None:
            task["zones"] = tuple(map(tuple, request.zones))
        return task

    def _actions(self, request: PredictRequest, card: PlanCard, *, frames: int) -> Floats:
        """Returns the actions, float32 [K, A]."""
        count, most = len(request.actions), self.settings.max_steps
        if count > most:
            raise _invalid("actions", f"at most {most} of them, got {count}")
        for number, action in enumerate(request.actions):
            if len(action) != card.action_width:
                told = f"{card.action_width} numbers, got {len(action)}"
                raise _invalid(f"actions.{number}", f"an action has {told}")
        if not frames:
            raise _invalid("frames", "at least one is needed")
        if frames > count + card.history:
            told = f"{card.history} to start from and {count} after the actions at most"
            raise _invalid("frames", f"{told}, got {frames}")
        return np.array(request.actions, np.float32)


def _listed(value: Any, param: str) -> list[tuple[Any, str]]:
    """Returns the frames of a field that may be a list, each with its path."""
    if not isinstance(value, list):
        return [(value, param)]
    return [(frame, f"{param}[{number}]") for number, frame in enumerate(value)]


def _filled(frames: list[Pixels], history: int) -> Pixels:
    """Returns frames [T, H, W, C], with the first one repeated where there are fewer than h."""
    return np.stack([frames[0]] * (history - len(frames)) + frames)


def _invalid(param: str, message: str) -> ApiError:
    return ApiError(400, "invalid_value", f"{param}: {message}", param=param)


def _plan_reply(request: PlanRequest, card: PlanCard, plan: Plan) -> dict[str, Any]:
    path = {"actions": _numbers(plan.actions_KA), "costs": _numbers(plan.costs_K)}
    path |= _imagined(plan.imagined, request.encoding_format)
    reply = {
        "object": "plan",
        "model": card.name,
        "fingerprint": card.fingerprint,
        "action": path["actions"][0],
        "path": path,
        "energy": path["distances"][-1],
        "usage": {"imagined_steps": plan.imagined_steps},
    }
    if request.session is not None:
        reply["session"] = {"id": request.session, "step": plan.step}
    if plan.surprise is not None:
        reply["surprise"] = _numbers(np.float32(plan.surprise))
    return reply


def _prediction_reply(
    request: PredictRequest, card: PlanCard, prediction: Prediction
) -> dict[str, Any]:
    told = _imagined(prediction.imagined, request.encoding_format)
    errors = _numbers(prediction.errors_K)
    energy = told["distances"][-1] if "distances" in told else None
    if errors:
        told["errors"] = errors
        energy = sum(errors) / len(errors) if energy is None else energy
    return {
        "object": "prediction",
        "model": card.name,
        "fingerprint": card.fingerprint,
        "energy": energy,
        **told,
        "usage": {"imagined_steps": len(request.actions)},
    }


def _imagined(imagined: Imagined, encoding_format: str) -> dict[str, Any]:
    told: dict[str, Any] = {
        "embeddings": encode_values(imagined.latents_KD, encoding_format),
        "shape": list(imagined.latents_KD.shape),
    }
    others = {
        "distances": imagined.goal_K,
        "places": imagined.places_K2,
        "disagreement": imagined.disagreement_K,
    }
    return told | {name: _numbers(array) for name, array in others.items() if array is not None}


def _numbers(values: Any) -> Any:
    """Returns numbers for JSON; raises a 500 if some are none."""
    return encode_values(np.asarray(values), "float")
