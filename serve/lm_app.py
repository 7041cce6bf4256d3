"""The Serve application: `serve run serve.lm_app:build_app model=DIR`.

A request goes to an `LMIngress` replica, which parses it, tokenizes the prompt and writes the
reply, then to a `LanguageModel` replica, which generates the tokens. Requests of one session always
go to the same model replica. Both report to `Telemetry`.
"""
# No `from __future__ import annotations` here: Serve reads `build_app`'s annotation as a class.

from pathlib import Path

from fastapi import FastAPI
from ray import serve as ray_serve
from ray.serve.config import RequestRouterConfig

from serve.ingress.application import IngressParts
from serve.ingress.deployment import IngressReplica, build_application, model_options
from serve.ingress.model_handle import DeployedModel
from serve.lm.contract import LANGUAGE_MODEL
from serve.lm.frontend.client import LMClient
from serve.lm.frontend.routes import create_lm_app
from serve.lm.frontend.served_models import ServedModels
from serve.lm.settings import LMSettings

ROUTER = "serve.lm.router.SessionRouter"


@ray_serve.ingress()
class LMIngress(IngressReplica[LMSettings]):
    """HTTP replica: parses requests, tokenizes prompts, writes replies."""

    model_name = LANGUAGE_MODEL

    async def create_app(self, parts: IngressParts) -> FastAPI:
        """See `IngressReplica`."""
        assert isinstance(self.model, DeployedModel)  # its settings have no placement
        client = LMClient(
            self.model.handle,
            persistent=self.settings.store is not None,
            silence_s=self.settings.replica_silence_s,
        )
        models = await ServedModels.find(self.settings, client)
        return create_lm_app(parts, models, client)


def build_app(args: LMSettings) -> ray_serve.Application:
    """Returns the application; Serve calls this with `args` of the command line or config file."""
    args = _absolute(args)
    return build_application(args, model_deployment(args), LMIngress)


def _absolute(settings: LMSettings) -> LMSettings:
    """Makes local paths absolute, because replicas may run in another directory."""
    changes = {}
    if Path(settings.model).exists():
        changes["model"] = str(Path(settings.model).resolve())
    if settings.store is not None and "://" not in settings.store:
        changes["store"] = str(Path(settings.store).resolve())
    if settings.name is None:
        changes["name"] = settings.model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
    return settings.model_copy(update=changes)


def model_deployment(settings: LMSettings) -> ray_serve.Deployment:
    """Returns the deployment of `LanguageModel`."""
    # Imported only here: ingress replicas import this file, and need neither torch nor the model.
    from serve.lm.replica.language_model import LanguageModel

    make = ray_serve.deployment(
        name=LANGUAGE_MODEL,
        # Above the number of requests that all ingress replicas can hold: a session must not go to
        # another replica because its own is busy, and `take` and `hold` cost nothing.
        max_ongoing_requests=6 * settings.max_requests * settings.ingress_replicas,
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,  # type: ignore[arg-type]
            request_router_kwargs={"num_fallback_replicas": 0},
        ),
        health_check_period_s=5,
        **model_options(settings),
    )
    return make(LanguageModel)
