"""A saved agent plans as the one that was saved, and damage is found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from models.digests import DamagedFileError
from models.objectives.registry import build_objective
from models.planning.actors.space import ActionSpace
from models.planning.configurator import Rules, TaskSpec
from models.planning.costs.critic import Critic
from models.planning.costs.slow_distance import SlowDistance
from models.planning.saved_agent import SavedAgent, agent_files, load_agent
from models.planning.world_model.readout import Readout
from models.planning.worlds.two_rooms import TwoRooms
from pipelines.recipes.planning import worldmodel_tworooms

ZONE = (5.0, 13.0, 11.0, 19.0)


def saved(**fields) -> SavedAgent:
    torch.manual_seed(0)
    run = worldmodel_tworooms()
    settings = {
        "name": "worldmodel",
        "model": run.model_settings,
        "objective": run.objective_settings | {"latent_width": 8, "dynamics_width": 16},
    }
    model = build_objective("worldmodel", model=settings["model"], objective=settings["objective"])
    torch.nn.init.normal_(model.predictors[0].change.weight)  # zero says that nothing moves
    critic = Critic(8, width=16)
    critic.adjust(torch.randn(20, 8), 3.0)
    made = SavedAgent(
        model=model.eval(),
        settings=settings,
        critic=critic,
        distance=SlowDistance(features_DF=torch.randn(8, 5)),
        readout=Readout(weight_D2=torch.randn(9, 2)),
        actions=ActionSpace(width=2, longest=1.5),
        world="tworooms",
        frame=(32, 32),
        task=TaskSpec(steps=4, budget=96, zones=(ZONE,)),
        rules=Rules(rounds=2),
        provenance={"checkpoint": "runs/x"},
    )
    return dataclasses.replace(made, **fields)


def write(folder: Path, agent: SavedAgent) -> str:
    for name, data in agent_files(agent).items():
        (folder / name).write_bytes(data)
    return str(folder)


def plans_of(agent: SavedAgent, task: TaskSpec | None = None) -> torch.Tensor:
    world, generator = TwoRooms(), torch.Generator().manual_seed(1)
    starts, goals = (world.render(world.sample_places(3, generator)) for _ in range(2))
    made = agent.agent(task, seed=5)
    made.begin(goals)
    return made.plan(starts, torch.arange(3))


@pytest.mark.parametrize(
    "without",
    [{}, {"critic": None}, {"critic": None, "distance": None}, {"critic": None, "readout": None}],
)
def test_it_plans_as_before(tmp_path: Path, without: dict) -> None:
    task = TaskSpec(steps=4, budget=96, zones=(ZONE,) if "readout" not in without else ())
    before = saved(**without, task=task)
    again = load_agent(write(tmp_path, before))
    assert torch.equal(plans_of(again), plans_of(before))
    assert plans_of(again).norm(dim=-1).max() <= 1.5 + 1e-5
    for field in ("actions", "world", "frame", "task", "rules", "provenance"):
        assert getattr(again, field) == getattr(before, field), field
    assert not any(p.requires_grad for p in again.model.parameters())


BUTTONS = ActionSpace(width=2, choices=((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)))


def test_an_agent_that_presses_buttons_presses_no_others(tmp_path: Path) -> None:
    before = saved(critic=None, readout=None, actions=BUTTONS, task=TaskSpec(steps=4, budget=96))
    again = load_agent(write(tmp_path, before))
    assert again.actions == BUTTONS
    plans = plans_of(again)
    assert torch.equal(plans, plans_of(before))
    assert {tuple(row) for row in plans.flatten(0, 1).tolist()} <= set(BUTTONS.choices or ())


def test_what_is_no_choice_is_brought_to_the_nearest() -> None:
    given = torch.tensor([[[0.9, 0.2], [0.0, 1.0]], [[0.8, 0.7], [0.1, 0.0]]])
    nearest = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 0.0]]])
    assert torch.equal(BUTTONS.limited(given), nearest)


def test_a_request_may_have_a_task_of_its_own() -> None:
    agent = saved()
    other = dataclasses.replace(agent.task, steps=7, budget=999)
    assert plans_of(agent).shape == (3, 4, 2)
    assert plans_of(agent, other).shape == (3, 7, 2)


def test_damage_and_strangers_are_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no agent\.json, so no agent"):
        load_agent(str(tmp_path))
    uri = write(tmp_path, saved())
    weights = tmp_path / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DamagedFileError, match="not the file that was saved"):
        load_agent(uri)
    told = json.loads((tmp_path / "agent.json").read_text())
    (tmp_path / "agent.json").write_text(json.dumps(told | {"format": 9}))
    with pytest.raises(ValueError, match="format 9, this version reads 1"):
        load_agent(uri)


def described(change: dict) -> str:
    def altered(value: dict, by: dict) -> dict:
        found = {key: one for key, one in value.items() if by.get(key, one) is not None}
        return found | {
            key: altered(value[key], one) if isinstance(one, dict) else one
            for key, one in by.items()
            if one is not None
        }

    return json.dumps(altered(json.loads(agent_files(saved())["agent.json"]), change))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"agent\.json is no JSON"),
        (described({})[:-20], r"agent\.json is no JSON"),
        ("[1]", "format None, this version reads 1"),
        (described({"model": None}), r"describes no agent \(KeyError: 'model'\)"),
        (described({"task": {"hurry": 3}}), r"describes no agent \(TypeError: .*'hurry'"),
        (described({"rules": {"elites": 7}}), r"describes no agent \(ValueError: --rules.elites"),
        (described({"rules": {"elites": "many"}}), r"describes no agent \(TypeError"),
        (described({"frame": [32]}), r"describes no agent \(IndexError"),
        (described({"model": {"objective": {"latent_width": 4}}}), r"describes no agent \(Runt"),
        (described({"model": {"name": "ijepa"}}), "describes no agent"),
    ],
)
def test_a_description_that_was_changed_is_told_with_its_place(
    tmp_path: Path, text: str, told: str
) -> None:
    uri = write(tmp_path, saved())
    (tmp_path / "agent.json").write_text(text)
    with pytest.raises((ValueError, DamagedFileError), match=rf"{tmp_path}.*{told}"):
        load_agent(uri)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    uri = write(tmp_path, saved())
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights\.safetensors"):
        load_agent(uri)
