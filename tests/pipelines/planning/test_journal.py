"""Episodes are found again under the key of all that decides about them, and under no other."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from models.planning.configurator import Rules, TaskSpec
from models.planning.costs.intrinsic import goal_distance
from models.planning.worlds.two_rooms import TrueModel, TwoRooms
from pipelines.planning.episodes import draw_tasks, random_policy, run_episodes
from pipelines.planning.journal import Journal, key_of
from pipelines.planning.rows import Comparison, Fitted

WORLD = TwoRooms()


def parts_of(model: nn.Module) -> Comparison:
    return Comparison(
        trained=Fitted(model=model, critic=None, distance=goal_distance, readout=torch.neg),
        settings={},
        untrained=TrueModel(world=WORLD),
        control=None,
        task=TaskSpec(),
        rules=Rules(),
        seed=0,
    )


def test_episodes_come_back_as_they_were(tmp_path: Path) -> None:
    journal = Journal(folder=str(tmp_path / "played"))
    tasks = draw_tasks(WORLD, "zone", 5, 0)
    episodes = run_episodes(WORLD, random_policy(WORLD, 0), tasks, 7)
    assert journal.read("one") is None
    journal.write("one", episodes, 1.25)
    found, seconds = journal.read("one") or (None, 0)
    assert seconds == 1.25
    assert all(
        torch.equal(getattr(found, f.name), getattr(episodes, f.name)) for f in fields(found)
    )
    journal.remove()
    assert not (tmp_path / "played").exists()
    journal.remove()  # of an empty journal there is nothing to remove


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"one\.safetensors: is damaged .*delete it"):
        Journal(folder=str(tmp_path)).read("one")


def test_the_key_is_of_the_content_and_everything_counts() -> None:
    parts, tasks = parts_of(nn.Linear(2, 2)), draw_tasks(WORLD, "cross", 4, 0)
    same = copy.deepcopy(parts)
    assert key_of(parts, "row", None, tasks) == key_of(same, "row", None, tasks)
    moved = copy.deepcopy(parts)
    with torch.no_grad():
        moved.trained.model.weight[0, 0] += 1e-6
    others = [
        (moved, "row", None, tasks),
        (replace(parts, rules=Rules(elites=0.2)), "row", None, tasks),
        (replace(parts, task=TaskSpec(steps=49)), "row", None, tasks),
        (replace(parts, seed=1), "row", None, tasks),
        (replace(parts, control=parts.trained), "row", None, tasks),
        (replace(parts, trained=replace(parts.trained, readout=torch.abs)), "row", None, tasks),
        (parts, "other row", None, tasks),
        (parts, "row", 480, tasks),
        (parts, "row", None, tasks.part(slice(3))),
        (parts, "row", None, replace(tasks, hides=True)),
        (parts, "row", None, draw_tasks(WORLD, "cross", 4, 1)),
    ]
    keys = {key_of(*one) for one in [(parts, "row", None, tasks), *others]}
    assert len(keys) == 1 + len(others)
