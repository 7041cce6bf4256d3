"""The Serve application: `serve run serve.planning_app:build_app agent=DIR`.

A request goes to a `PlanIngress` replica, which parses it and decodes its frames, then to a
`Planner` replica, which searches for the plans of many sessions side by side. Requests of one
session go to the same planner as long as it is there. With `placement=together` the one ingress
replica holds the planner. All replicas report to `Telemetry`.
"""
# No `from __future__ import annotations` here: Serve reads `build_app`'s annotation as a class.

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.config import RequestRouterConfig

from serve.ingress.application import IngressParts
from serve.ingress.deployment import IngressReplica, build_application, model_options
from serve.planning.contract import PLANNER, PlanCard
from serve.planning.frontend.client import PlannerClient
from serve.planning.frontend.routes import create_planning_app
from serve.planning.frontend.service import PlanningService
from serve.planning.settings import PlanningSettings
from serve.replicas.served_model import ServedModel

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


@ray_serve.ingress()
class PlanIngress(IngressReplica[PlanningSettings]):
    """HTTP replica: parses requests and decodes their frames.

    Args:
        settings: see `PlanningSettings`.
        model: handle of the planner, or that it is held here.
        telemetry: handle of `Telemetry`.
        card: the agent that this replica was deployed with.
    """

    model_name = PLANNER

    def __init__(
        self, settings: PlanningSettings, model: Any, telemetry: Any, card: PlanCard
    ) -> None:
        super().__init__(settings, model, telemetry, card)
        self._card = card

    async def create_app(self, parts: IngressParts) -> FastAPI:
        """See `IngressReplica`."""
        settings, card = self.settings, self._card
        client = PlannerClient(self.model, card, silence_s=settings.replica_silence_s)
        return create_planning_app(parts, PlanningService(settings, ServedModel(card), client))


def build_app(args: PlanningSettings) -> ray_serve.Application:
    """Returns the application; Serve calls this with `args` of the command line or config file.

    The agent is read here once, so that all replicas know which one they belong to, and one that
    cannot be read is refused before anything is replaced.
    """
    from serve.planning.replica.planner import read_card

    if Path(args.agent).exists():  # replicas may run in another directory
        args = args.model_copy(update={"agent": str(Path(args.agent).resolve())})
    return build_application(args, model_deployment(args), PlanIngress, card=read_card(args))


def model_deployment(settings: PlanningSettings) -> ray_serve.Deployment:
    """Returns the deployment of `Planner`."""
    # Imported only here: ingress replicas import this file, and need neither torch nor the model.
    from serve.planning.replica.planner import Planner

    make = ray_serve.deployment(
        name=PLANNER,
        # The batch that runs, the next one, and one more, as for the embedder.
        max_ongoing_requests=3 * settings.batch_size,
        max_queued_requests=settings.max_queued,
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,  # type: ignore[arg-type]
            # Otherwise a planner that is slow to tell its queue would lose sessions to the next.
            request_router_kwargs={"num_fallback_replicas": 0},
        ),
        **model_options(settings),
    )
    return make(Planner)
