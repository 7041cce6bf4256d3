"""The planning application over real HTTP on a real Ray: with two planners, and with one inside."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from helpers.repository import ROOT
from helpers.serve.bad_plans import LIMITS, plan, predict
from helpers.serve.planning import WORLD, fresh_agent, png_of, save_agent, walk
from helpers.waiting import wait_until

pytestmark = pytest.mark.ray

APP = f"planning{os.getpid()}"
SESSIONS, STEPS = 32, 4


PLACED: dict[str, dict[str, Any]] = {
    "separate": {"num_replicas": 2, "ingress_cpus": 0.1},
    "together": {},
}


@pytest.fixture(scope="module", params=PLACED)
def url(
    request: pytest.FixtureRequest, serve_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    from ray import serve as ray_serve

    from serve.planning.settings import PlanningSettings
    from serve.planning_app import build_app

    folder = save_agent(tmp_path_factory.mktemp("agent") / "fresh", fresh_agent())
    settings = PlanningSettings(
        agent=folder,
        placement=request.param,
        threads=1,
        cpus=0.1,
        **PLACED[request.param],
        replica_silence_s=100,  # a busy machine is slow, and a call that is repeated goes elsewhere
        **LIMITS,
    )
    ray_serve.run(build_app(settings), name=APP)
    yield serve_url
    ray_serve.delete(APP)


def test_32_sessions_at_once_each_on_its_own_planner(url: str) -> None:
    async def episode(http: httpx.AsyncClient, number: int) -> list[httpx.Response]:
        ((start, goal),) = walk(1, seed=number)
        body = {"observation": png_of(start), "goal": png_of(goal), "session": f"s{number}"}
        return [await http.post("/v1/plan", json=body) for _ in range(STEPS)]

    async def run() -> list[list[httpx.Response]]:
        limits = httpx.Limits(max_connections=SESSIONS)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
            return await asyncio.gather(*(episode(http, number) for number in range(SESSIONS)))

    for number, replies in enumerate(asyncio.run(run())):
        assert [reply.status_code for reply in replies] == [200] * STEPS, replies[0].text
        told = [reply.json() for reply in replies]
        # No other session's plan, and none that another planner had.
        assert [each["session"] for each in told] == [
            {"id": f"s{number}", "step": step} for step in range(STEPS)
        ]
        for each in told:
            assert sum(value**2 for value in each["action"]) ** 0.5 <= WORLD.max_step + 1e-5


def test_errors_predictions_and_metrics(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as http:
        assert http.get("/healthz").text == "ok"
        reply = http.post("/v1/predict", json=predict())
        assert reply.status_code == 200, reply.text
        for path, body, param in (
            ("/v1/plan", plan(budget=23), "budget"),  # refused by the planner
            ("/v1/predict", predict(actions=[[9, 9]]), "actions.0"),
            ("/v1/plan", plan(goal=""), "goal"),  # by the ingress
        ):
            refused = http.post(path, json=body)
            assert refused.status_code == 400, refused.text
            assert refused.json()["error"]["param"] == param
        # Planners report every five seconds.
        wait_until(lambda: "rayjepa_predictions_total" in http.get("/metrics").text, every_s=0.2)
        text = http.get("/metrics").text
    assert 'rayjepa_requests_total{route="/v1/plan",status="400"}' in text
    section = (ROOT / "docs" / "planning_http.md").read_text().partition("## Metrics")[2]
    named = set(re.findall(r"rayjepa_[a-z_]+", section.partition("\n## ")[0]))
    assert len(named) > 6
    assert [name for name in sorted(named) if name not in text] == []
