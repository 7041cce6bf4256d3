"""A request is prepared and embedded by one model, whichever replicas Serve's handle leads to."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError

from helpers.serve.embeddings import SIZE, WIDTH, save_tiny_artifact
from helpers.serve.fake_model import CARD, URI, fake_embed
from models.media.preprocessing import EncoderInput
from serve.embeddings.contract import EMBEDDER, ModelCard
from serve.embeddings.frontend.client import EmbedderClient
from serve.embeddings.frontend.service import EmbeddingService
from serve.embeddings.replica.embedder import Embedder, read_card
from serve.embeddings.settings import ServeSettings
from serve.ingress.errors import ApiError
from serve.ingress.model_handle import DeployedModel
from serve.replicas import served_model
from serve.replicas.calls import MATCHING, OtherModel, Refusal
from serve.replicas.served_model import ServedModel


def other_card(name: str, size: int) -> ModelCard:
    prep = dataclasses.replace(CARD.preprocessing, image_size=size, patch_size=size // 4)
    return dataclasses.replace(CARD, name=name, fingerprint=f"of {name}", preprocessing=prep)


OLD, NEW = CARD, other_card("new", 2 * SIZE)


class Replicas:
    """A handle that leads to replicas of these models in turn, and notes what they are sent."""

    def __init__(self, *cards: ModelCard) -> None:
        self.turn = itertools.cycle(cards)
        self.calls: list[tuple[str, int]] = []
        self.embed = self

    async def remote(
        self, inputs: Sequence[EncoderInput], pooling: str, fingerprint: str
    ) -> list[np.ndarray] | Refusal:
        card = next(self.turn)
        self.calls.append((card.name, inputs[0].pixels.shape[0]))
        if fingerprint != card.fingerprint:
            return Refusal(card)
        assert inputs[0].pixels.shape[0] == card.preprocessing.image_size
        return await fake_embed(inputs, pooling)


def ingress(own: ModelCard, replicas: Replicas) -> EmbeddingService:
    client = EmbedderClient(DeployedModel(replicas, EMBEDDER), own)
    return EmbeddingService(ServeSettings(artifact="a"), ServedModel(own), client.embed)


def ask(service: EmbeddingService, **body: Any) -> Any:
    return json.loads(asyncio.run(service.answer(json.dumps({"input": URI} | body).encode())))


def test_replicas_of_both_models_each_ingress_keeps_to_its_own() -> None:
    for own, size in ((OLD, SIZE), (NEW, 2 * SIZE)):
        replicas = Replicas(OLD, NEW)
        service = ingress(own, replicas)
        for _ in range(3):
            reply = ask(service)
            assert (reply["model"], reply["fingerprint"]) == (own.name, own.fingerprint)
        assert {pixels for _, pixels in replicas.calls} == {size}


@pytest.mark.parametrize(("own", "there"), [(OLD, NEW), (NEW, OLD)])
def test_without_a_replica_of_its_own_model_it_answers_by_the_one_that_is_there(
    own: ModelCard, there: ModelCard
) -> None:
    replicas = Replicas(there)
    service = ingress(own, replicas)
    reply = ask(service)
    assert (reply["model"], reply["fingerprint"]) == (there.name, there.fingerprint)
    assert len(replicas.calls) == MATCHING + 1
    ask(service)
    assert len(replicas.calls) == MATCHING + 2  # it knows now
    assert service.model.card == there
    replicas.turn = itertools.cycle([own])
    assert ask(service)["model"] == own.name  # and comes back at the first sign
    assert service.model.card == own
    assert len(replicas.calls) == MATCHING + 4


def test_a_request_that_names_a_model_waits_for_it_or_is_told_that_it_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served_model, "LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr(served_model, "GONE_AFTER_S", 0.0)
    starting = Replicas(OLD)
    starting.turn = itertools.chain([OLD] * 3 * MATCHING, itertools.repeat(NEW))  # type: ignore[assignment]
    new = ingress(NEW, starting)
    assert ask(new, model="new")["model"] == "new"
    assert len(starting.calls) == 3 * MATCHING + 1

    replicas = Replicas(OLD)
    old = ingress(OLD, replicas)
    assert ask(old, model="tiny")["model"] == "tiny"
    replicas.turn = itertools.cycle([NEW])
    with pytest.raises(ApiError) as gone:
        ask(old, model="tiny")
    assert (gone.value.status, gone.value.code) == (404, "model_not_found")
    assert ask(old, model="new")["model"] == "new"
    with pytest.raises(ApiError):
        ask(ingress(OLD, Replicas(OLD)), model="new")  # nobody has told it of that one


def test_what_is_refused_is_never_an_answer() -> None:
    image = EncoderInput(np.zeros((SIZE, SIZE, 3), np.uint8))
    client = EmbedderClient(DeployedModel(Replicas(NEW), EMBEDDER), OLD)
    with pytest.raises(OtherModel) as other:
        asyncio.run(client.embed([image], "mean", OLD))
    assert other.value.card == NEW
    there = EmbedderClient(DeployedModel(Replicas(OLD), EMBEDDER), OLD)
    (vector,) = asyncio.run(there.embed([image], "mean", OLD))
    assert vector.shape == (WIDTH,)


def _same(folder: Path) -> dict[str, Any]:
    return {"artifact": str(folder)}


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Path], dict[str, Any]]]] = {
    "the image size": ({"size": 2 * SIZE}, _same),
    "the crop": ({"crop_fraction": 0.5}, _same),
    "the fit": ({"fit": "squash"}, _same),
    "regions": ({"exclude": ((0.0, 0.0, 0.5, 0.5),)}, _same),
    "the interpolation": ({"interpolation": "bilinear"}, _same),
    "the background": ({"background": (1, 2, 3)}, _same),
    "the type of numbers": ({}, lambda folder: _same(folder) | {"dtype": "bf16"}),
    "the name": ({}, lambda folder: _same(folder) | {"model": "another"}),
    "nothing": ({}, lambda folder: _same(folder) | {"batch_size": 7, "max_items": 3}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_tells_models_apart(change: str, tmp_path: Path) -> None:
    transform, settings = CHANGES[change]
    save_tiny_artifact(tmp_path / "one" / "m")
    save_tiny_artifact(tmp_path / "two" / "m", **transform)
    one = read_card(ServeSettings(artifact=str(tmp_path / "one" / "m")))
    two = read_card(ServeSettings(**settings(tmp_path / "two" / "m")))
    assert (one.fingerprint == two.fingerprint) == (change == "nothing")


def test_a_replica_of_an_artifact_that_has_changed_does_not_start(tmp_path: Path) -> None:
    save_tiny_artifact(tmp_path / "m")
    settings = ServeSettings(artifact=str(tmp_path / "m"), threads=1)
    deployed = read_card(settings)
    shutil.rmtree(tmp_path / "m")
    save_tiny_artifact(tmp_path / "m", crop_fraction=0.5)
    with pytest.raises(ValueError, match="another model here than when it was deployed"):
        Embedder(settings, None, deployed)


@pytest.mark.parametrize(
    ("listed", "found", "told"),
    [
        (True, OLD, True),
        (False, OLD, True),  # it answers, whatever the controller says
        (True, None, True),  # busy
        (False, None, False),
        (
            True,
            NEW,
            "ok, but a replica serves new (of new), and this one was",
        ),
    ],
)
def test_health_tells_when_a_replica_serves_another_model(
    listed: bool, found: ModelCard | None, told: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        def __init__(self) -> None:
            self.describe = self

        async def remote(self) -> ModelCard:
            if found is None:
                raise ActorDiedError
            return found

    monkeypatch.setattr(DeployedModel, "_is_listed", lambda self: listed)
    ready = asyncio.run(DeployedModel(Model(), EMBEDDER, OLD).is_ready())
    assert ready == told if isinstance(told, bool) else str(ready).startswith(told)
