"""The model of an application, in replicas of its own or in the process of its HTTP replicas."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from pydantic import ValidationError
from ray.exceptions import ActorDiedError

from helpers.serve.embeddings import direct_tokens, encoded, picture, save_tiny_artifact
from helpers.serve.fake_model import CARD
from models.media.preprocessing import EncoderInput
from serve import app, planning_app
from serve.embeddings.contract import ModelCard
from serve.embeddings.frontend.client import EmbedderClient
from serve.embeddings.media.inputs import to_input
from serve.embeddings.replica import embedder as embedder_module
from serve.embeddings.replica.embedder import Embedder, read_card
from serve.embeddings.settings import ServeSettings
from serve.ingress.application import IngressParts
from serve.ingress.deployment import MAX_ONGOING, IngressReplica, with_model
from serve.ingress.errors import ApiError
from serve.ingress.model_handle import DeployedModel, InProcess, LocalModel, ModelHandle
from serve.planning.settings import PlanningSettings
from serve.replicas.calls import OtherModel, Refusal

INPUT = EncoderInput(np.zeros((32, 32, 3), np.uint8))


class Replica:
    """Answers after a while, and counts its calls."""

    def __init__(self, answer: Any = None, seconds: float = 0.0) -> None:
        self.answer, self.seconds, self.calls = answer, seconds, 0

    async def embed(self, *_: Any) -> Any:
        self.calls += 1
        await asyncio.sleep(self.seconds)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def deployed(replica: Replica) -> DeployedModel:
    return DeployedModel(SimpleNamespace(embed=SimpleNamespace(remote=replica.embed)), "Embedder")


def ask(model: ModelHandle) -> Any:
    return asyncio.run(EmbedderClient(model, CARD, silence_s=0.05).embed([INPUT], "mean", CARD))


@pytest.mark.parametrize(("place", "calls"), [(LocalModel, 1), (deployed, 3)])
def test_only_replicas_of_their_own_are_asked_again(place: Any, calls: int) -> None:
    """In its own process a second call would only wait behind the first, and cost as much."""
    slow = Replica([np.ones(3)], seconds=0.3)
    (vector,) = ask(place(slow))
    assert (vector.sum(), slow.calls) == (3, calls)
    dying = Replica(ActorDiedError())
    with pytest.raises(ApiError, match="no model replica"):
        ask(place(dying))
    assert dying.calls == calls


def test_a_refusal_of_the_own_process_is_an_answer_by_nobody() -> None:
    other = Replica(Refusal(CARD))
    with pytest.raises(OtherModel):
        ask(LocalModel(other))
    assert other.calls == 1


def test_a_model_in_the_same_process_gives_the_direct_forward(tmp_path: Path) -> None:
    save_tiny_artifact(tmp_path / "tiny")
    settings = ServeSettings(artifact=str(tmp_path / "tiny"), threads=1)
    images = [encoded(picture(seed)) for seed in range(3)]

    async def run() -> list[Any]:
        card = read_card(settings)
        local = LocalModel(Embedder(settings, None, card))
        assert await local.is_ready() is True
        assert await local.call("describe") == card
        prep = card.preprocessing
        inputs = [to_input(one, prep, max_pixels=10**6, param="input").input for one in images]
        return await EmbedderClient(local, card).embed(inputs, "mean", card)

    expected = [direct_tokens(tmp_path / "tiny", one).mean(axis=0) for one in images]
    np.testing.assert_allclose(asyncio.run(run()), expected, atol=1e-5)


def test_placement_decides_which_deployments_there_are(tmp_path: Path) -> None:
    save_tiny_artifact(tmp_path / "tiny")
    chosen = {"artifact": str(tmp_path / "tiny"), "num_replicas": 2, "cpus": 3}
    apart = app.build_app(ServeSettings.model_validate(chosen))._bound_deployment
    bound = apart.init_args[1]._bound_deployment
    assert (apart.name, apart.num_replicas, bound.name, bound.num_replicas) == (
        *("Ingress", 1),
        *("Embedder", 2),
    )
    chosen |= {"placement": "together", "gpus": 1, "max_replicas": 5}
    one = app.build_app(ServeSettings.model_validate(chosen))._bound_deployment
    assert (one.name, one.init_args[1]) == ("Ingress", InProcess(Embedder))
    assert one.func_or_class is app.Ingress
    assert one.ray_actor_options == {"num_cpus": 3, "num_gpus": 1}
    scaling = one._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    # In all else it is an ingress: typed errors instead of Serve's, and a new one before an old.
    assert (one.max_ongoing_requests, one.max_queued_requests) == (MAX_ONGOING, -1)
    assert one._deployment_config.max_surge_percent == apart._deployment_config.max_surge_percent


def test_the_planner_s_router_stays_with_replicas_of_its_own() -> None:
    settings = PlanningSettings(agent="a", placement="together")
    model = planning_app.model_deployment(settings)
    both = with_model(planning_app.PlanIngress, settings, model)
    routers = [one._deployment_config.request_router_config for one in (model, both)]
    assert [router.request_router_class == planning_app.ROUTER for router in routers] == [
        True,
        False,
    ]


def test_a_held_model_s_health_is_the_replica_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_artifact(tmp_path / "tiny")
    settings = ServeSettings(artifact=str(tmp_path / "tiny"), threads=1, placement="together")

    class Plain(IngressReplica[ServeSettings]):
        model_name = "Embedder"

        async def create_app(self, parts: IngressParts) -> FastAPI:
            raise NotImplementedError

    async def make(model: Any, card: ModelCard) -> Plain:
        return Plain(settings, model, None, card)

    card = read_card(settings)
    held = asyncio.run(make(InProcess(Embedder), card))
    held.check_health()
    monkeypatch.setattr(embedder_module, "STUCK_AFTER_S", -1.0)
    with pytest.raises(RuntimeError, match="a forward pass has been running"):
        held.check_health()
    # A replica that only calls the model is watched by Serve itself.
    assert not hasattr(asyncio.run(make(SimpleNamespace(), card)), "check_health")


@pytest.mark.parametrize(
    ("name", "instead"), [("ingress_replicas", "num_replicas"), ("ingress_cpus", "cpus")]
)
def test_settings_of_replicas_that_are_not_there_are_refused(name: str, instead: str) -> None:
    chosen = {"artifact": "a", name: "2"}
    assert ServeSettings.model_validate(chosen)
    with pytest.raises(ValidationError, match=f"{name}: .*; set {instead},"):
        ServeSettings.model_validate(chosen | {"placement": "together"})
