"""Prompts are made of the tokens of the replica that they reach, whichever model it has."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest

from helpers.lm.serving import ask, cluster, run, save_tiny_lm, say
from helpers.waiting import LIMIT_S, eventually
from models.sink_lm.checkpoints.tokenizer import load_tokenizer
from serve.ingress.errors import ApiError
from serve.lm.contract import LMCard, Refusal
from serve.lm.frontend import served_models
from serve.lm.frontend.client import LMClient, OtherModel
from serve.lm.frontend.served_models import TRIES, ServedModels
from serve.lm.frontend.service import LanguageService
from serve.lm.settings import LMSettings

OLD = LMCard(
    name="old",
    created=0,
    vocab_size=9,
    capacity=8,
    sinks=1,
    sessions=1,
    bytes_per_session=1,
    fingerprint="f",
    persistent=True,
    model="old",
    release="r-old",
)
NEW = dataclasses.replace(OLD, name="new", model="new", release="r-new")


class Ring:
    """Replicas of these models. A key goes to the same one always, new keys to each in turn."""

    def __init__(self, *cards: LMCard) -> None:
        self.turn, self.places = itertools.cycle(cards), dict[str, LMCard]()
        self.sent: list[str] = []

    def models(self, name: str) -> ServedModels:
        client: Any = self
        settings = LMSettings(model="m", name=name)
        return ServedModels(settings, client, LanguageService(settings, OLD, None))  # type: ignore[arg-type]

    async def describe(self) -> LMCard:
        return next(self.turn)

    async def send(self, service: LanguageService, key: str, name: str | None) -> str:
        """What a route does: checks the name, makes tokens, sends them."""
        service.check_model(name)
        if key not in self.places:
            self.places[key] = next(self.turn)
        card = self.places[key]
        self.sent.append(card.name)
        if service.card.release != card.release:
            raise OtherModel(card)
        return card.name

    def ask(self, models: ServedModels, name: str | None = None, key: str = "") -> str:
        async def attempt(service: LanguageService, made_up: str) -> str:
            return await self.send(service, key or made_up, name)

        return asyncio.run(models.run(name, attempt))


@pytest.fixture(autouse=True)
def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_models, "load_tokenizer", lambda path: None)
    monkeypatch.setattr(served_models, "PAUSE_S", 0.0)


def test_a_request_without_a_model_is_taken_by_whichever_replica_it_reaches() -> None:
    ring = Ring(OLD, NEW)
    models = ring.models("new")
    assert [ring.ask(models) for _ in range(6)] == ["old", "new"] * 3
    assert len(ring.sent) == 6 + 5  # each change of the model costs one refusal


def test_a_request_that_names_a_model_looks_for_a_replica_of_it() -> None:
    for name in ("old", "new"):
        ring = Ring(OLD, NEW)
        models = ring.models("new")
        assert [ring.ask(models, name) for _ in range(6)] == [name] * 6
    ring = Ring(NEW)
    with pytest.raises(ApiError) as gone:
        ring.ask(ring.models("new"), "old")
    assert (gone.value.status, gone.value.code) == (404, "model_not_found")
    assert len(ring.sent) <= TRIES
    with pytest.raises(ApiError) as unknown:
        ring.ask(ring.models("new"), "other")
    assert unknown.value.code == "model_not_found"


def test_a_session_s_replica_decides() -> None:
    ring = Ring(NEW)
    models = ring.models("new")
    assert ring.ask(models, key="session") == "new"
    with pytest.raises(ApiError) as gone:
        ring.ask(models, "old", key="session")
    assert gone.value.code == "model_not_found"


def test_a_tokenizer_that_is_not_here_is_an_error_to_try_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(served_models, "load_tokenizer", missing)
    ring = Ring(NEW)
    with pytest.raises(OtherModel) as error:
        ring.ask(ring.models("new"))
    assert (error.value.status, error.value.code) == (503, "model_changed")


def test_a_replica_refuses_tokens_of_another_model(tiny_lm: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm) as made:
            card = await made.replica.describe()
            start = dataclasses.replace(ask("r1", None, "ab"), release="another")
            assert await made.replica.start(start) == Refusal(card)
            asked = ("s", None, (), None, "r2")
            assert await made.replica.create(*asked, "another") == Refusal(card)
            with pytest.raises(OtherModel):
                await made.client().start("key", start)
            assert await say(made.replica, "s", "ab", release=card.release)

    run(test())


def test_what_makes_another_release(tiny_lm: Path, tmp_path: Path) -> None:
    """The fingerprint stays for sessions; the release is of all that makes a prompt's tokens."""
    same, shifted = load_tokenizer(str(tiny_lm)), tmp_path / "shifted"
    shifted.mkdir()
    save_tiny_lm(shifted, more=["<|more|>"])
    assert load_tokenizer(str(tiny_lm)).fingerprint == same.fingerprint
    assert load_tokenizer(str(shifted)).fingerprint != same.fingerprint
    template = tiny_lm / "chat_template.jinja"
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_lm.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / template.name).write_text(template.read_text().replace("Be kind.", "Be brief."))
    assert load_tokenizer(str(other)).fingerprint != same.fingerprint


def test_a_replica_is_held_until_its_answer_has_ended(tiny_lm: Path) -> None:
    async def test() -> None:
        async with cluster(tiny_lm) as made:
            client: LMClient = made.client()
            answer = await client.answer(ask("r1", None, "ab", max_tokens=30))
            holding = asyncio.ensure_future(made.replica.hold("r1"))
            await eventually(lambda: bool(made.replica._active._over))
            pieces = answer.pieces()
            await anext(pieces)
            assert not holding.done()
            async for _ in pieces:
                pass
            await asyncio.wait_for(holding, LIMIT_S)
            await asyncio.wait_for(made.replica.hold("r1"), LIMIT_S)  # it is over

    run(test())
