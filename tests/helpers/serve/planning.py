"""A small agent on disk, frames as clients send them, and a model that sees where the point is."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import torch
from fastapi import FastAPI
from PIL import Image
from torch import Tensor

from models.objectives.registry import build_objective
from models.planning.actors.space import ActionSpace
from models.planning.configurator import TaskSpec
from models.planning.costs.critic import Critic
from models.planning.saved_agent import SavedAgent, agent_files
from models.planning.world_model.readout import Readout
from models.planning.world_model.world_model import WorldModel
from models.planning.worlds.two_rooms import SIDE, TwoRooms
from pipelines.recipes.planning import worldmodel_tworooms
from serve.ingress.application import IngressParts
from serve.ingress.model_handle import LocalModel
from serve.planning.frontend.client import PlannerClient
from serve.planning.frontend.routes import create_planning_app
from serve.planning.frontend.service import PlanningService
from serve.planning.replica.imagination import Imagination
from serve.planning.replica.planner import Planner, read_card
from serve.planning.settings import PlanningSettings
from serve.replicas.served_model import ServedModel

WORLD = TwoRooms()
WIDTH = 8
"""Dimensions of the small agent's latents."""
TASK = TaskSpec(steps=4, budget=96)


def fresh_agent(
    *, ensemble: int = 1, history: int = 1, readout: bool = True, **fields: Any
) -> SavedAgent:
    """An agent with random weights, of which nothing is zero."""
    torch.manual_seed(0)
    run = worldmodel_tworooms()
    own = {"latent_width": WIDTH, "dynamics_width": 16, "ensemble": ensemble, "history": history}
    settings = {
        "name": "worldmodel",
        "model": run.model_settings,
        "objective": run.objective_settings | own,
    }
    model = build_objective("worldmodel", model=settings["model"], objective=settings["objective"])
    assert isinstance(model, WorldModel)
    for predictor in model.predictors:
        torch.nn.init.normal_(predictor.change.weight, std=0.3)
    critic = Critic(history * WIDTH, width=16)
    critic.requires_grad_(False).adjust(torch.randn(20, history * WIDTH), 3.0)
    given: dict[str, Any] = {
        "critic": critic,
        "actions": ActionSpace(width=2, longest=WORLD.max_step),
        "world": "tworooms",
        "frame": (SIDE, SIDE),
        "task": TASK,
        "provenance": {},
        "readout": Readout(weight_D2=torch.randn(history * WIDTH + 1, 2)) if readout else None,
    }
    return SavedAgent(
        model=model.eval().requires_grad_(False), settings=settings, **(given | fields)
    )


def save_agent(folder: Path, agent: SavedAgent) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in agent_files(agent).items():
        (folder / name).write_bytes(data)
    return str(folder)


class SeeingModel:
    """The true simulator behind a picture: it reads the place off the frame, where the dot is."""

    history = 1

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        """Returns the dot's centre: only the dot is red."""
        red_BHW = frames_BCHW[:, 0].float()
        centres_H = torch.arange(SIDE) + 0.5
        total_B = red_BHW.sum((1, 2))
        x_B = (red_BHW.sum(1) * centres_H).sum(1) / total_B
        y_B = (red_BHW.sum(2) * centres_H).sum(1) / total_B
        return torch.stack([x_B, y_B], dim=1)

    def rollout(self, places_B2: Tensor, actions_BT2: Tensor) -> Tensor:
        return WORLD.rollout(places_B2, actions_BT2)[None]


def seeing_agent(**task: Any) -> SavedAgent:
    """An agent that plans in the true world, from pictures."""
    model = cast(WorldModel, SeeingModel())
    own = {"steps": 50, "budget": 1600} | task
    agent = fresh_agent(critic=None, readout=False, task=TaskSpec(**own))
    return SavedAgent(**{**vars(agent), "model": model, "readout": lambda latents: latents})


def frame_at(x: float, y: float) -> np.ndarray:
    """The world's picture with the point at a place, uint8 [H, W, 3]."""
    return WORLD.render(torch.tensor([[x, y]]))[0].permute(1, 2, 0).contiguous().numpy()


def png_of(frame_HWC: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def raw_of(frame_HWC: np.ndarray) -> dict[str, str]:
    return {"raw": base64.b64encode(frame_HWC.tobytes()).decode()}


def walk(count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields frames of starts and goals in the left room, some steps apart."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        y = generator.uniform(3, 29)
        yield frame_at(3, y), frame_at(12, 32 - y)


class Handle:
    """A Serve handle that leads to planners of this process, and notes the sessions of its calls.

    Calls fail as told before they succeed.
    """

    def __init__(self, *planners: Any, failures: tuple[Exception, ...] = ()) -> None:
        self.planners, self.failures = planners, list(failures)
        self.sessions: list[str] = []

    def options(self, *, session_id: str, method_name: str) -> SimpleNamespace:
        self.sessions.append(session_id)
        place = sum(session_id.encode()) % len(self.planners)
        call = getattr(self.planners[place], method_name)

        async def remote(*args: Any) -> Any:
            if self.failures:
                raise self.failures.pop(0)
            return await call(*args)

        return SimpleNamespace(remote=remote)


def application(
    folder: str, *, saved: SavedAgent | None = None, api_key: str | None = None, **settings: Any
) -> FastAPI:
    """Returns the application around one planner of this process; an event loop must run.

    Args:
        folder: an agent's.
        saved: plans in place of the agent in the folder.
        api_key: key that is asked for.
        settings: of the application.
    """

    async def is_ready() -> bool:
        return True

    async def scrape() -> str:
        return "metrics"

    full = PlanningSettings(agent=folder, threads=1, **settings)
    card = read_card(full)
    planner = Planner(full, None, card)
    if saved is not None:
        planner._saved, planner._imagination = saved, Imagination(saved)
    service = PlanningService(full, ServedModel(card), PlannerClient(LocalModel(planner), card))
    parts = IngressParts(settings=full, scrape=scrape, is_ready=is_ready, api_key=api_key)
    return create_planning_app(parts, service)


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def requests(
    folder: str,
    *asked: tuple[str, str, dict[str, Any]],
    in_turn: bool = False,
    **settings: Any,
) -> list[httpx.Response]:
    """Sends requests (method, path, httpx arguments), all at once or one after the other.

    The other arguments are those of `application`.
    """

    async def run() -> list[httpx.Response]:
        async with client_of(application(folder, **settings)) as http:
            calls = [http.request(method, path, **kw) for method, path, kw in asked]
            if in_turn:
                return [await call for call in calls]
            return await asyncio.gather(*calls)

    return asyncio.run(run())


def post(path: str, **body: Any) -> tuple[str, str, dict[str, Any]]:
    return "POST", path, {"json": body}
