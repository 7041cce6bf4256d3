"""The planner: answers the requests of many sessions in batches."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from models.digests import digest_of_bytes
from models.file_systems import read_bytes
from models.media.preprocessing import Preprocessing
from models.planning.actors.actor import METHODS
from models.planning.configurator import TaskSpec
from models.planning.saved_agent import DESCRIPTION, SavedAgent, load_agent
from serve.ingress.errors import ApiError
from serve.planning.contract import (
    Plan,
    PlanCard,
    PlanQuery,
    Prediction,
    PredictQuery,
)
from serve.planning.replica.imagination import Answer, Imagination, PlanTask, Task
from serve.planning.replica.sessions import Session, SessionTable
from serve.planning.settings import PlanningSettings
from serve.replicas.batch_threads import BatchThreads
from serve.replicas.batching import Batcher
from serve.replicas.calls import Refusal
from serve.replicas.served_model import check_deployed
from serve.telemetry import BATCH_BUCKETS, LATENCY_BUCKETS_S, Reporter

STUCK_AFTER_S = 120.0
"""Seconds that a batch may take before the replica counts as unhealthy."""
SLACK = 1e-3
"""How far an action may lie outside of what the world allows, as a share of its length."""


def read_card(settings: PlanningSettings) -> PlanCard:
    """Reads what is known of the agent.

    Raises:
        FileNotFoundError: there is no agent.
        ValueError: it cannot be read, or plans for more than `max_budget`.
    """
    saved = load_agent(settings.agent)
    if saved.task.budget > settings.max_budget:
        raise ValueError(
            f"max_budget={settings.max_budget}: the agent's own plans cost {saved.task.budget} "
            "imagined steps. Raise it, or save the agent with a smaller --budget"
        )
    return _card_of(settings, saved)


def _card_of(settings: PlanningSettings, saved: SavedAgent) -> PlanCard:
    # The description holds the digest of the weights.
    described = read_bytes(f"{settings.agent.rstrip('/')}/{DESCRIPTION}")
    name = settings.model or saved.world
    digest = hashlib.sha256(repr((digest_of_bytes(described), name)).encode()).hexdigest()
    task = dataclasses.asdict(saved.task)
    limits = dataclasses.asdict(saved.actions).items()
    actions = {name: value for name, value in limits if value is not None}
    return PlanCard(
        name=name,
        fingerprint=digest,
        world=saved.world,
        preprocessing=Preprocessing(
            image_size=saved.frame,
            # The model normalises by itself; these are for the margins of padded pictures.
            mean=tuple(saved.settings["model"]["mean"]),
            std=tuple(saved.settings["model"]["std"]),
            fit=saved.settings["model"].get("fit") or "crop",
        ),
        history=saved.model.history,
        state_width=_state_width(saved),
        action_width=saved.actions.width,
        actions=actions,
        # Choices are searched in one way, whatever the method.
        methods=tuple(METHODS) if saved.actions.choices is None else (saved.task.method,),
        judged_by="distance" if saved.critic is None else "critic",
        predictors=len(saved.model.predictors),
        reads_places=saved.readout is not None,
        task=task | {"zones": [list(zone) for zone in saved.task.zones]},
    )


def _state_width(saved: SavedAgent) -> int:
    blank_BCHW = torch.zeros(1, 3, *saved.frame, dtype=torch.uint8)
    with torch.inference_mode():
        return saved.model.encode(blank_BCHW).shape[1]


class Planner:
    """Serve deployment around an `Imagination`; its batches run in `BatchThreads`.

    Args:
        settings: see `PlanningSettings`.
        telemetry: handle of the `Telemetry` deployment.
        card: what the agent was when the application was built.

    Raises:
        ValueError: the agent has changed since then.
    """

    def __init__(self, settings: PlanningSettings, telemetry: Any, card: PlanCard) -> None:
        self._threads = BatchThreads(settings)  # before anything is computed
        self._saved = load_agent(settings.agent)
        self._card = _card_of(settings, self._saved)
        check_deployed(self._card, card, f"agent={settings.agent}")
        self._imagination = Imagination(self._saved, settings.seed)
        self._sessions = SessionTable(settings.max_sessions, settings.session_ttl_s)
        self._metrics(telemetry)
        self._warm_up(max(1, settings.batch_size // self._threads.max_concurrent_batches))
        self._batcher: Batcher[Task, Answer] = Batcher(
            self._run,
            batch_size=settings.batch_size,
            max_wait_s=settings.max_wait_ms / 1000,
            max_concurrent_batches=self._threads.max_concurrent_batches,
        )

    async def describe(self) -> PlanCard:
        """Returns what this replica serves."""
        return self._card

    async def plan(self, query: PlanQuery, fingerprint: str) -> Plan | Refusal[PlanCard] | ApiError:
        """Finds a plan, in a batch with those of other sessions.

        Args:
            query: the observation, the goal and the task.
            fingerprint: of the agent that the query was prepared for.

        Returns:
            The plan; a refusal if this replica serves another agent, or an error if the task makes
            no sense.
        """
        if fingerprint != self._card.fingerprint:
            return Refusal(self._card)
        spec = self._spec(query.task)
        if isinstance(spec, ApiError):
            return spec
        goal = hashlib.sha256(query.goal_HWC.tobytes()).hexdigest()
        session = None if query.session is None else self._sessions.find(query.session, goal)
        found = await self._batcher.submit(PlanTask(query=query, spec=spec, session=session))
        assert isinstance(found, Plan)
        self._plans.inc()
        self._imagined_steps.inc(found.imagined_steps)
        if query.session is not None:
            self._remember(query.session, goal, found)
        return found

    async def predict(
        self, query: PredictQuery, fingerprint: str
    ) -> Prediction | Refusal[PlanCard] | ApiError:
        """Imagines what actions lead to; arguments and results as for `plan`."""
        if fingerprint != self._card.fingerprint:
            return Refusal(self._card)
        error = self._check_actions(query.actions_KA)
        if error is not None:
            return error
        found = await self._batcher.submit(query)
        assert isinstance(found, Prediction)
        self._predictions.inc()
        self._imagined_steps.inc(len(query.actions_KA))
        return found

    def check_health(self) -> None:
        """Called by Serve every few seconds.

        Raises:
            RuntimeError: a batch takes too long.
        """
        if self._threads.longest_s() > STUCK_AFTER_S:
            raise RuntimeError(f"a batch has been running for over {STUCK_AFTER_S:.0f} s")

    def _spec(self, task: Mapping[str, Any]) -> TaskSpec | ApiError:
        try:
            spec = dataclasses.replace(self._saved.task, **task)
            self._saved.agent(spec)
        except ValueError as error:  # it names a flag, which is a field here
            flag, _, message = str(error).partition(": ")
            param = flag.removeprefix("--")
            return ApiError(400, "invalid_value", f"{param}: {message}", param=param)
        return spec

    def _check_actions(self, actions_KA: np.ndarray) -> ApiError | None:
        """Returns what is wrong with the first action that the world does not allow."""
        given_KA = torch.from_numpy(actions_KA)
        limited_KA = self._saved.actions.limited(given_KA)
        beyond_K = (given_KA - limited_KA).norm(dim=-1) > SLACK * (1 + limited_KA.norm(dim=-1))
        if not beyond_K.any():
            return None
        number = int(beyond_K.nonzero()[0])
        param = f"actions.{number}"
        allowed = ", ".join(f"{name} {value}" for name, value in self._card.actions.items())
        message = f"{param} is none of the world's actions ({allowed})"
        return ApiError(400, "invalid_value", message, param=param)

    def _remember(self, name: str, goal: str, plan: Plan) -> None:
        """Keeps what is left of a plan, unless something in it is no number."""
        if not all(np.isfinite(array).all() for array in (plan.actions_KA, *plan.imagined.arrays)):
            self._sessions.forget(name)
            return
        session = Session(
            goal=goal,
            rest_KA=plan.actions_KA[1:],
            expected_D=plan.imagined.latents_KD[0],
            step=plan.step + 1,
        )
        before = self._sessions.crowded_out
        self._sessions.keep(name, session)
        self._crowded_out.inc(self._sessions.crowded_out - before)

    async def _run(self, tasks: list[Task]) -> list[Answer]:
        started = time.monotonic()
        try:
            return await self._threads.run(
                partial(self._imagination.run, tasks), is_single=len(tasks) == 1
            )
        finally:
            self._batch_size.observe(len(tasks))
            self._seconds.observe(time.monotonic() - started)

    def _warm_up(self, most: int) -> None:
        """Runs a single plan and a full batch, so that no request waits for first-time set-up."""
        height, width = self._saved.frame
        blank_hHWC = np.zeros((self._card.history, height, width, 3), np.uint8)
        goal_HWC = blank_hHWC[0]
        query = PlanQuery(observation_hHWC=blank_hHWC, goal_HWC=goal_HWC, session=None, task={})
        task = PlanTask(query=query, spec=self._saved.task, session=None)
        one, full = (partial(self._imagination.run, [task] * count) for count in (1, most))
        self._threads.warm_up(one, full)

    def _metrics(self, telemetry: Any) -> None:
        registry = CollectorRegistry()
        self._plans = Counter("rayjepa_plans", "Plans found", registry=registry)
        self._predictions = Counter("rayjepa_predictions", "Predictions made", registry=registry)
        self._imagined_steps = Counter(
            "rayjepa_imagined_steps", "Steps imagined for plans and predictions", registry=registry
        )
        self._crowded_out = Counter(
            "rayjepa_plan_sessions_crowded_out",
            "Sessions forgotten for want of room",
            registry=registry,
        )
        self._batch_size = Histogram(
            "rayjepa_planning_batch_size",
            "Plans and predictions in a batch",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self._seconds = Histogram(
            "rayjepa_planning_seconds",
            "Duration of a batch of plans and predictions",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        sessions = Gauge("rayjepa_plan_sessions", "Sessions remembered", registry=registry)
        sessions.set_function(lambda: len(self._sessions))
        self._reporter = Reporter(registry, telemetry)
