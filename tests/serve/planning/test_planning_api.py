"""The planning API around a planner of this process: answers, errors, sessions, limits."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from benchmarks.serving.planning import Config, Player, Readings
from helpers.serve.bad_plans import LIMITS, PLANS, PREDICTIONS, Case, plan, predict
from helpers.serve.planning import (
    WIDTH,
    WORLD,
    Handle,
    application,
    client_of,
    frame_at,
    fresh_agent,
    png_of,
    post,
    raw_of,
    requests,
    save_agent,
    seeing_agent,
)
from models.planning.actors.space import ActionSpace
from models.planning.costs.slow_distance import SlowDistance
from pipelines.planning.episodes import draw_tasks
from serve.ingress.errors import ApiError
from serve.ingress.model_handle import DeployedModel
from serve.planning.contract import PLANNER, PlanCard, PlanQuery
from serve.planning.frontend.client import PlannerClient
from serve.planning.replica.planner import Planner, read_card
from serve.planning.settings import PlanningSettings
from serve.planning_app import model_deployment
from serve.replicas.calls import OtherModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_agent(tmp_path_factory.mktemp("agent") / "fresh", fresh_agent())


def one(folder: str, path: str, body: dict[str, Any], **more: Any) -> Any:
    (reply,) = requests(folder, post(path, **body), **more)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_a_plan_and_where_it_is_expected_to_lead(folder: str) -> None:
    reply = one(folder, "/v1/plan", plan())
    assert (reply["object"], reply["model"]) == ("plan", "tworooms")
    path = reply["path"]
    assert reply["action"] == path["actions"][0]
    assert np.shape(path["actions"]) == (4, 2)
    assert np.shape(path["embeddings"]) == (4, WIDTH)
    assert path["shape"] == [4, WIDTH]
    assert [np.shape(path[name]) for name in ("costs", "distances", "places")] == [
        (4,),
        (4,),
        (4, 2),
    ]
    assert reply["energy"] == path["distances"][-1]
    assert "session" not in reply
    assert "surprise" not in reply
    assert "disagreement" not in path  # a single predictor
    assert reply["usage"] == {"imagined_steps": 96}


def test_a_prediction_equals_the_model_s_rollout_however_the_frame_is_sent(folder: str) -> None:
    agent, actions = fresh_agent(), [[1.0, 0.5], [-1.0, 0.0]]
    frames = torch.from_numpy(np.stack([frame_at(3, 3), frame_at(9, 9)])).permute(0, 3, 1, 2)
    start_BD, goal_BD = agent.model.encode(frames).chunk(2)
    expected_KD = agent.model.rollout(start_BD, torch.tensor([actions]))[0, 0]
    energy = float((expected_KD[-1] - goal_BD[0]).norm())
    forms: list[Any] = [png_of(frame_at(3, 3)), raw_of(frame_at(3, 3)), [png_of(frame_at(3, 3))]]
    forms += [{"image": png_of(frame_at(3, 3))}, png_of(frame_at(3, 3)).partition(",")[2]]
    body = {"actions": actions, "goal": png_of(frame_at(9, 9))}
    for reply in requests(folder, *(post("/v1/predict", frames=form, **body) for form in forms)):
        assert reply.status_code == 200, reply.text
        told = reply.json()
        np.testing.assert_allclose(told["embeddings"], expected_KD.numpy(), atol=1e-4)
        assert told["energy"] == pytest.approx(energy, rel=1e-4)
        assert told["energy"] == told["distances"][-1]
    as_text = one(folder, "/v1/predict", {"frames": forms[0], "encoding_format": "base64", **body})
    values = np.frombuffer(base64.b64decode(as_text["embeddings"]), "<f4")
    np.testing.assert_allclose(values.reshape(as_text["shape"]), expected_KD.numpy(), atol=1e-4)


def test_what_a_prediction_s_energy_is(folder: str) -> None:
    places = [frame_at(x, 10) for x in (4, 5, 8)]
    frames, actions = [png_of(frame) for frame in places], [[1, 0], [1, 0]]
    seeing = {"saved": seeing_agent()}
    alone = one(folder, "/v1/predict", {"frames": frames[0], "actions": actions}, **seeing)
    assert alone["energy"] is None
    assert "errors" not in alone
    seen = one(folder, "/v1/predict", {"frames": frames, "actions": actions}, **seeing)
    assert seen["errors"] == pytest.approx([0, 2], abs=0.02)
    assert seen["energy"] == pytest.approx(1, abs=0.02)
    body = {"frames": frames, "actions": actions, "goal": png_of(frame_at(6, 13))}
    wanted = one(folder, "/v1/predict", body, **seeing)
    assert wanted["energy"] == pytest.approx(3, abs=0.02)
    assert wanted["distances"] == pytest.approx([10**0.5, 3], abs=0.02)


def test_pictures_of_other_sizes_are_fitted(folder: str) -> None:
    large = np.kron(frame_at(3, 3), np.ones((4, 4, 1), np.uint8))
    bodies = [predict(frames=png_of(frame)) for frame in (frame_at(3, 3), large)]
    small, big = (one(folder, "/v1/predict", body) for body in bodies)
    np.testing.assert_allclose(big["embeddings"], small["embeddings"], atol=0.5)
    (refused,) = requests(folder, post("/v1/predict", **predict(frames=raw_of(large))))
    assert refused.json()["error"]["param"] == "frames.raw"


@pytest.mark.parametrize(
    ("path", "cases"), [("/v1/plan", PLANS), ("/v1/predict", PREDICTIONS)], ids=["plan", "predict"]
)
def test_malformed_requests_are_typed(folder: str, path: str, cases: list[Case]) -> None:
    def content(body: Any) -> bytes:
        return body if isinstance(body, bytes) else json.dumps(body).encode()

    headers = {"content-type": "application/json"}
    asked = [("POST", path, {"content": content(case[1]), "headers": headers}) for case in cases]
    replies = requests(folder, *asked, **LIMITS)
    for (name, _, status, code, param), reply in zip(cases, replies, strict=True):
        assert reply.status_code == status, (name, reply.text)
        error = reply.json()["error"]
        assert (error["code"], error["param"]) == (code, param), name
        assert error["type"] == "invalid_request_error"
        assert error["message"], name


def test_good_requests_at_the_limits_pass(folder: str) -> None:
    wide = [[-1e6, -1e6, 1e6, 1e6], [0, 0, 1, 1]]
    good = [
        post("/v1/plan", **plan(zones=wide, budget=1000, steps=10_000, caution=1e6, user="me")),
        post("/v1/plan", **plan(budget=24, method="icem", session=None, zones=[], model=None)),
        post("/v1/predict", **predict(actions=[[1.5, 0]] * 8, frames=[png_of(frame_at(3, 3))] * 9)),
    ]
    replies = requests(folder, *good, **LIMITS)
    assert [reply.status_code for reply in replies] == [200] * 3, [r.text for r in replies]
    assert len(replies[0].json()["path"]["actions"]) == 16  # the longest horizon


def test_a_model_without_places_keeps_out_of_no_zones(tmp_path: Path) -> None:
    blind = save_agent(tmp_path / "blind", fresh_agent(readout=False, ensemble=3))
    refused, good = requests(blind, post("/v1/plan", **plan(zones=[[0, 0, 1, 1]])),
                             post("/v1/plan", **plan(caution=1.0)))  # fmt: skip
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "zones")
    assert "places" not in good.json()["path"]
    assert np.shape(good.json()["path"]["disagreement"]) == (4,)


def test_a_model_with_a_history_takes_its_last_frames(tmp_path: Path) -> None:
    folder = save_agent(tmp_path / "two", fresh_agent(history=2))
    before, now, goal = (png_of(frame_at(x, 10)) for x in (4, 5, 9))
    bodies = [plan(observation=seen) for seen in ([before, now], [now, now], [now], now)]
    predicted = predict(frames=[before, now, now], actions=[[1, 0], [1, 0]], goal=goal)
    asked = [post("/v1/plan", **body) for body in bodies]
    asked += [post("/v1/plan", **plan(observation=[now] * 3)), post("/v1/predict", **predicted)]
    asked += [post("/v1/predict", **predict(frames=[now] * 5)), ("GET", "/v1/models/tworooms", {})]
    replies = requests(folder, *asked)
    assert [reply.status_code for reply in replies] == [200] * 4 + [400, 200, 400, 200]
    assert replies[4].json()["error"]["param"] == "observation"
    assert replies[6].json()["error"]["param"] == "frames"  # two to start from, two after actions
    assert (replies[7].json()["history"], replies[7].json()["dimensions"]) == (2, 2 * WIDTH)
    told = replies[5].json()
    assert told["shape"] == [2, 2 * WIDTH]
    assert len(told["errors"]) == 1
    model = fresh_agent(history=2).model
    frames = [torch.from_numpy(frame_at(x, 10)).permute(2, 0, 1) for x in (4, 5, 5)]
    states = model.encode(torch.stack([torch.cat(frames[:2]), torch.cat(frames[1:])]))
    expected = model.rollout(states[:1], torch.tensor([[[1.0, 0.0]]]))[0, 0, 0]
    assert told["errors"][0] == pytest.approx(float((expected - states[1]).norm()), rel=1e-3)


def test_an_agent_of_a_game_answers_with_buttons(tmp_path: Path) -> None:
    choices = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    actions = ActionSpace(width=2, choices=choices)
    distance = SlowDistance(features_DF=torch.randn(WIDTH, 3))
    agent = fresh_agent(critic=None, distance=distance, readout=False, actions=actions)
    folder = save_agent(tmp_path / "game", agent)
    asked = [
        post("/v1/plan", **plan()),
        post("/v1/predict", **predict(actions=[[1, 1], [0, 1]])),
        post("/v1/predict", **predict(actions=[[1, 1], [0, 0]])),
        post("/v1/plan", **plan(method="mppi")),
        ("GET", "/v1/models/tworooms", {}),
    ]
    found, imagined, strange, refused, card = requests(folder, *asked)
    assert found.status_code == imagined.status_code == 200
    assert {tuple(row) for row in found.json()["path"]["actions"]} <= set(choices)
    assert (strange.status_code, strange.json()["error"]["param"]) == (400, "actions.1")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "method")
    told = card.json()
    assert told["actions"] == {"width": 2, "choices": [list(row) for row in choices]}
    assert (told["judged_by"], told["methods"]) == ("distance", ["cem"])


def test_a_session_is_remembered_until_its_goal_changes(folder: str) -> None:
    body = plan(session="walk-1")
    same, other = post("/v1/plan", **body), post("/v1/plan", **body | {"goal": body["observation"]})
    stranger = post("/v1/plan", **body | {"session": "walk-2"})
    replies = requests(folder, same, same, stranger, same, other, other, in_turn=True)
    told = [(reply.json()["session"]["step"], "surprise" in reply.json()) for reply in replies]
    first, later = (0, False), (1, True)
    assert told == [first, later, first, (2, True), first, later]


def test_sessions_reach_their_goals_in_the_true_world_through_http(folder: str) -> None:
    async def run() -> Readings:
        readings, tasks = Readings(), draw_tasks(WORLD, "same", 8, seed=3)
        async with client_of(application(folder, saved=seeing_agent())) as http:
            player = Player(Config(agent=Path(folder), steps=40), http, readings)
            parts = [tasks.part(slice(number, number + 1)) for number in range(8)]
            await asyncio.gather(*(player.play(*row) for row in zip(
                range(8), ["same"] * 8, parts, strict=True)))  # fmt: skip
        return readings

    readings = asyncio.run(run())
    assert readings.reached["same"] == [True] * 8
    assert (readings.errors, readings.begun_anew, set(readings.statuses)) == ([], 0, {200})
    assert len(readings.latency_s) > 8 * 4  # goals are eight pixels away at least


def test_a_planner_remembers_no_more_sessions_than_it_may(folder: str) -> None:
    names = ["a", "b", "c", "a"]
    asked = [post("/v1/plan", **plan(session=name)) for name in names]
    replies = requests(folder, *asked, in_turn=True, max_sessions=2)
    assert [reply.json()["session"]["step"] for reply in replies] == [0, 0, 0, 0]
    replies = requests(folder, *asked, in_turn=True, max_sessions=3)
    assert [reply.json()["session"]["step"] for reply in replies] == [0, 0, 0, 1]


def test_nothing_that_is_no_number_is_answered_or_remembered(folder: str) -> None:
    broken = fresh_agent()
    with torch.no_grad():
        broken.model.predictors[0].change.bias.fill_(torch.inf)
    asked = [post("/v1/plan", **plan(session="a"))] * 2 + [post("/v1/predict", **predict())]
    for reply in requests(folder, *asked, saved=broken, in_turn=True):
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "not_finite")


def test_the_same_door_as_the_other_applications(folder: str) -> None:
    asked = [
        ("GET", "/healthz", {}),
        ("GET", "/v1/models", {}),
        ("POST", "/v1/plan", {"json": plan()}),
        ("GET", "/v1/models/tworooms", {"headers": {"Authorization": "Bearer s3cret"}}),
        ("GET", "/v1/models/maze", {"headers": {"Authorization": "Bearer s3cret"}}),
        ("GET", "/v1/plan", {"headers": {"Authorization": "Bearer s3cret"}}),
    ]
    replies = requests(folder, *asked, api_key="s3cret")
    assert [reply.status_code for reply in replies] == [200, 401, 401, 200, 404, 405]
    model = replies[3].json()
    assert (model["action_width"], model["actions"]["longest"]) == (2, 1.5)
    assert (model["judged_by"], model["places"], model["image_size"]) == ("critic", True, [32, 32])
    assert "cem" in model["methods"]
    assert model["task"]["budget"] == 96


def test_openapi_describes_both_requests(folder: str) -> None:
    (reply,) = requests(folder, ("GET", "/openapi.json", {}))
    for path, field in (("/v1/plan", "observation"), ("/v1/predict", "frames")):
        operation = reply.json()["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert field in schema["required"]
        assert schema["additionalProperties"] is False
        assert "200" in operation["responses"]


def test_overload_is_shed_with_429(folder: str) -> None:
    replies = requests(folder, *[post("/v1/plan", **plan())] * 6, max_queued=2)
    refused = [reply for reply in replies if reply.status_code != 200]
    assert len(refused) == 4
    assert {reply.status_code for reply in refused} == {429}
    assert refused[0].json()["error"]["code"] == "queue_full"


async def asked(client: PlannerClient, card: PlanCard) -> Any:
    query = PlanQuery(
        observation_hHWC=frame_at(3, 3)[None], goal_HWC=frame_at(9, 9), session="a", task={}
    )
    return await client.plan(query, card)


def test_a_lost_planner_costs_a_session_its_place_and_no_request(folder: str) -> None:
    async def run(*failures: Exception) -> tuple[Handle, Any]:
        settings = PlanningSettings(agent=folder, threads=1)
        card = read_card(settings)
        handle = Handle(Planner(settings, None, card), failures=failures)
        return handle, await asked(PlannerClient(DeployedModel(handle, PLANNER), card), card)

    handle, found = asyncio.run(run(ActorDiedError()))
    assert found.step == 0
    assert handle.sessions[0] == "a"
    assert handle.sessions[1] != "a"  # it is asked elsewhere
    with pytest.raises(ApiError) as full:
        asyncio.run(run(BackPressureError(1, 1)))
    assert (full.value.status, full.value.code) == (429, "queue_full")
    with pytest.raises(ApiError) as gone:
        asyncio.run(run(*[ActorDiedError()] * 3))
    assert (gone.value.status, gone.value.code) == (503, "no_replica")


def test_serve_passes_over_no_planner_that_is_slow(folder: str) -> None:
    """By default Serve takes the next two of the ring, where the session would begin anew."""
    made = model_deployment(PlanningSettings(agent=folder))
    router = made._deployment_config.request_router_config
    assert router.request_router_kwargs == {"num_fallback_replicas": 0}


def test_a_planner_of_another_agent_refuses(folder: str, tmp_path: Path) -> None:
    other = save_agent(tmp_path / "other", fresh_agent(world="maze"))

    async def run() -> tuple[PlanCard, PlanCard, Exception]:
        old, new = (PlanningSettings(agent=place, threads=1) for place in (folder, other))
        handle = Handle(Planner(new, None, read_card(new)))
        client = PlannerClient(DeployedModel(handle, PLANNER), read_card(old))
        with pytest.raises(OtherModel) as caught:
            await asked(client, read_card(old))
        return read_card(old), read_card(new), caught.value

    mine, theirs, error = asyncio.run(run())
    assert isinstance(error, OtherModel)
    assert error.card == theirs
    assert mine.fingerprint != theirs.fingerprint


def test_an_agent_that_has_changed_since_the_deployment_does_not_start(tmp_path: Path) -> None:
    place = save_agent(tmp_path / "a", fresh_agent())
    settings = PlanningSettings(agent=place, threads=1)
    deployed = read_card(settings)
    save_agent(tmp_path / "a", fresh_agent(ensemble=2))
    with pytest.raises(ValueError, match=r"agent=.*another model here than when it was deployed"):
        Planner(settings, None, deployed)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gpus", 1, "planners run on CPUs"),
        ("placement", "apart", "separate.*together"),
        ("max_image_bytes", 2**30, "exceeds max_request_bytes"),
        ("max_session", 3, "Extra inputs"),
        ("batch_size", 0, "greater than or equal to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanningSettings.model_validate({"agent": "a", name: value})


def test_sessions_of_one_process_need_one_planner() -> None:
    placed = {"agent": "a", "placement": "together"}
    assert PlanningSettings.model_validate(placed).num_replicas == 1
    with pytest.raises(ValueError, match="another planner with each request"):
        PlanningSettings.model_validate(placed | {"num_replicas": 2})


def test_replies_are_json_that_every_parser_reads(folder: str) -> None:
    (reply,) = requests(folder, post("/v1/plan", **plan(session="a")))
    assert isinstance(reply, httpx.Response)
    assert reply.headers["content-type"] == "application/json"
    json.loads(reply.content, parse_constant=pytest.fail)
