"""An agent's step on a GPU that is not there: every tensor on it, and few waits for it.

What is random is drawn on the host, so each round of a search copies its noise to the device once.
A categorical search also copies its chances to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from helpers.fake_device import GPU, WAITS, Watch, fake_gpu, put
from models.planning.actors.space import ActionSpace
from models.planning.configurator import Rules, TaskSpec
from models.planning.costs.critic import Critic
from models.planning.costs.slow_distance import SlowDistance
from models.planning.saved_agent import SavedAgent
from models.planning.world_model.readout import Readout
from models.planning.world_model.world_model import WorldModel
from pipelines.config.train import PretrainConfig
from pipelines.recipes.planning import (
    worldmodel_doom,
    worldmodel_doom_patches,
    worldmodel_tworooms,
)
from pipelines.runs.checkpoints import new_objective

ROUNDS, EPISODES = 3, 4
SPACE = ActionSpace(width=2, longest=1.5)
BUTTONS = ActionSpace(width=7, choices=tuple(tuple(row) for row in torch.eye(7).tolist()))
ZONE = (5.0, 13.0, 11.0, 19.0)


def on_gpu(run: PretrainConfig, actions: ActionSpace, *, critic: bool) -> SavedAgent:
    """A saved agent of a recipe, of fake tensors on the GPU; call it among such."""
    with torch.device("meta"), unset_fake_temporarily():
        model = new_objective(run)
        assert isinstance(model, WorldModel)
        width = model.history * model.frame_width
        judge = Critic(width)
    return SavedAgent(
        model=cast(WorldModel, put(model)).eval().requires_grad_(False),
        settings={},
        critic=cast(Critic, put(judge)).requires_grad_(False) if critic else None,
        distance=SlowDistance(features_DF=torch.empty(width, 3, device=GPU)),
        readout=Readout(weight_D2=torch.empty(width + 1, 2, device=GPU)),
        actions=actions,
        world="a world",
        frame=run.model.height_width,
        task=TaskSpec(steps=6, budget=600),
        rules=Rules(rounds=ROUNDS, recalled=2),
        provenance={},
    )


def step(saved: SavedAgent, *, there: int, back: int) -> torch.Tensor:
    """Plans twice, so that there is a plan to go on with and a memory to read; the second time
    under watch."""
    agent = saved.agent()
    frames = torch.empty(EPISODES, 3, *saved.frame, dtype=torch.uint8, device=GPU)
    rows = torch.empty(EPISODES, dtype=torch.int64, device=GPU)
    agent.begin(frames)
    agent.plan(frames, rows)
    with Watch(copies_there=there, copies_back=back):
        return agent.plan(frames, rows)


@pytest.mark.parametrize("critic", [True, False], ids=["critic", "distance"])
@pytest.mark.parametrize("method", ["cem", "icem", "mppi", "shooting"])
def test_a_search_of_numbers_stays_on_the_device(method: str, critic: bool) -> None:
    with fake_gpu():
        saved = on_gpu(worldmodel_tworooms(), SPACE, critic=critic)
        saved = replace(saved, task=replace(saved.task, method=method))
        plans = step(saved, there=1 if method == "shooting" else ROUNDS, back=0)
    assert plans.device == GPU


@pytest.mark.parametrize("recipe", [worldmodel_doom, worldmodel_doom_patches])
def test_a_search_of_choices_draws_on_the_host(recipe: Callable[[], PretrainConfig]) -> None:
    with fake_gpu():
        # The choices and what is drawn of them go there, the chances come back.
        saved = on_gpu(recipe(), BUTTONS, critic=True)
        plans = step(saved, there=ROUNDS + 2, back=ROUNDS)
    assert plans.device == GPU


def test_zones_are_compared_where_the_places_are() -> None:
    with fake_gpu():
        saved = on_gpu(worldmodel_tworooms(), SPACE, critic=True)
        saved = replace(saved, task=replace(saved.task, zones=(ZONE,)))
        assert step(saved, there=99, back=0).device == GPU


def test_what_lies_elsewhere_is_found() -> None:
    with fake_gpu():
        saved = on_gpu(worldmodel_tworooms(), SPACE, critic=False)
        stray = SlowDistance(features_DF=torch.empty(32, 3))
        with pytest.raises(RuntimeError, match="device"):
            step(replace(saved, distance=stray), there=99, back=0)
        with pytest.raises(WAITS):
            step(saved, there=0, back=0)
