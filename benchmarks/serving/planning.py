"""Many sessions that plan over `/v1/plan` at once, in Two-Rooms: latency, errors, goals reached.

    python benchmarks/serving/planning.py --agent plans/agent        # of `pipelines.plan_episodes`

Starts the planning application, and lets every session play episodes through it: it draws the
picture, asks for a plan, takes the first action, until it is at its goal or its steps are used up.
Half of the goals lie in the other room. Latency is the client's, from the request to the whole
reply. Clients, proxy, ingress and planner share this machine. `--no-sessions` names no sessions, so
that every search starts from nothing.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:  # so that it runs from an uninstalled checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import httpx
import numpy as np
import torch
import tyro
from PIL import Image

from models.planning.worlds.two_rooms import TwoRooms
from pipelines.planning.episodes import KINDS, Tasks, draw_tasks

APP = "plans"
WORLD = TwoRooms()


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure."""

    agent: Path
    """Folder of an agent, as `pipelines.plan_episodes` writes it."""
    concurrent: int = 32
    """Sessions at once, each with one request on its way."""
    episodes: int = 64
    """Episodes in all."""
    steps: int = 50
    """Steps that an episode may take."""
    budget: int | None = None
    """Imagined steps of a plan; None takes the agent's."""
    sessions: bool = True
    """Whether requests name their session."""
    replicas: int = 1
    """Planners."""
    threads: int = 2
    """Torch threads of each."""
    seed: int = 7
    """Of starts and goals."""


@dataclass
class Readings:
    """What the clients saw."""

    latency_s: list[float] = field(default_factory=list)
    reached: dict[str, list[bool]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    statuses: Counter[int] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    begun_anew: int = 0
    """Sessions that a planner did not know although they had begun."""


class Player:
    """Plays episodes through the server, one after the other.

    Args:
        config: what to measure.
        http: a client of the server.
        readings: where results go.
    """

    def __init__(self, config: Config, http: httpx.AsyncClient, readings: Readings) -> None:
        self._config, self._http, self._readings = config, http, readings

    async def play(self, number: int, kind: str, task: Tasks) -> None:
        """Plays one episode, of one start and goal."""
        place_12, goal_12 = task.starts_B2, task.goals_B2
        body: dict[str, Any] = {"goal": picture(goal_12)}
        if self._config.budget is not None:
            body["budget"] = self._config.budget
        if self._config.sessions:
            body["session"] = f"episode-{number}"
        for step in range(self._config.steps):
            plan = await self._ask(body | {"observation": picture(place_12)})
            if plan is None:
                break
            if self._config.sessions:
                self._readings.begun_anew += plan["session"]["step"] != step
            place_12 = WORLD.step(place_12, torch.tensor([plan["action"]]))
            if WORLD.reached(place_12, goal_12):
                break
        self._readings.reached[kind].append(bool(WORLD.reached(place_12, goal_12)))

    async def _ask(self, body: dict[str, Any]) -> Any:
        begun = time.perf_counter()
        try:
            reply = await self._http.post("/v1/plan", json=body)
        except httpx.HTTPError as error:
            self._readings.errors.append(repr(error))
            return None
        self._readings.statuses[reply.status_code] += 1
        if reply.status_code != 200:
            self._readings.errors.append(reply.text[:200])
            return None
        self._readings.latency_s.append(time.perf_counter() - begun)
        return reply.json()


def picture(place_12: torch.Tensor) -> str:
    """The world's picture as a PNG."""
    buffer = io.BytesIO()
    frame_HWC = WORLD.render(place_12)[0].permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(frame_HWC).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


async def measure(config: Config, url: str) -> tuple[Readings, float]:
    """Plays all episodes, `concurrent` at a time; returns the readings and the seconds."""
    each = config.episodes // len(KINDS)
    tasks = {kind: draw_tasks(WORLD, kind, each, config.seed) for kind in KINDS}
    waiting = [(kind, tasks[kind].part(slice(i, i + 1))) for i in range(each) for kind in KINDS]
    readings, numbers = Readings(), iter(range(len(waiting)))
    limits = httpx.Limits(max_connections=config.concurrent)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        player = Player(config, http, readings)

        async def play_in_turn() -> None:
            for number in numbers:
                await player.play(number, *waiting[number])

        begun = time.perf_counter()
        await asyncio.gather(*(play_in_turn() for _ in range(config.concurrent)))
        seconds = time.perf_counter() - begun
        text = (await http.get("/metrics")).text
    batches = {
        part: float(found[1])
        for part in ("sum", "count")
        if (found := re.search(rf"^rayjepa_planning_batch_size_{part} (\S+)", text, re.M))
    }
    print(f"batches of {batches['sum'] / batches['count']:.1f} on average" if batches else "")
    return readings, seconds


def report(config: Config, readings: Readings, seconds: float) -> None:
    """Prints what came out."""
    plans = len(readings.latency_s)
    p50, p90, p99, most = np.quantile(readings.latency_s, (0.5, 0.9, 0.99, 1.0)) * 1e3
    rates = {kind: np.mean(reached) for kind, reached in readings.reached.items()}
    told = {
        "statuses": dict(readings.statuses),
        "errors": readings.errors[:5],
        "begun_anew": readings.begun_anew,
        "reached": {kind: f"{sum(r)} of {len(r)}" for kind, r in readings.reached.items()},
    }
    print(json.dumps(told))
    goals = ", ".join(f"{rate:.0%} {kind} room" for kind, rate in rates.items())
    print(
        f"result: {config.concurrent} sessions at once, {plans} plans in {seconds:.0f} s "
        f"({plans / seconds:.0f} a second), {len(readings.errors)} errors; p50 {p50:.0f}, "
        f"p90 {p90:.0f}, p99 {p99:.0f}, max {most:.0f} ms; goals reached: {goals}"
    )


def main(config: Config) -> None:
    """Serves, measures, prints."""
    import ray
    from ray import serve as ray_serve

    from serve.planning.settings import PlanningSettings
    from serve.planning_app import build_app

    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = PlanningSettings(
            agent=str(config.agent.resolve()),
            num_replicas=config.replicas,
            threads=config.threads,
            ingress_cpus=0.1,
        )
        ray_serve.run(build_app(settings), name=APP)
        url = f"http://127.0.0.1:{port}"
        warm_up = Config(**{**vars(config), "episodes": config.concurrent, "steps": 2, "seed": 99})
        asyncio.run(measure(warm_up, url))
        report(config, *asyncio.run(measure(config, url)))
    finally:
        ray_serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
