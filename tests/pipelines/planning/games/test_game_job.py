"""`plan_episodes --env`: all rows are played in the real game, summed up, drawn and written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.objectives.registry import build_objective
from models.planning.configurator import TaskSpec
from models.planning.world_model.world_model import WorldModel
from pipelines import plan_episodes as plan_job
from pipelines.plan_episodes import PlanEpisodesConfig, plan_episodes
from pipelines.planning.games.job import GameJob, compare, table
from pipelines.planning.games.navigation import KINDS
from pipelines.planning.games.rows import ROWS
from pipelines.recipes.planning import worldmodel_breakout, worldmodel_doom

RECIPES = {"my_way_home": worldmodel_doom, "breakout": worldmodel_breakout}


def fresh(env: str) -> WorldModel:
    """A small model with fresh weights, by the game's recipe."""
    recipe = RECIPES[env]()
    cfg = replace(recipe, objective=replace(recipe.objective, latent_width=8, dynamics_width=16))
    torch.manual_seed(0)
    built = build_objective(
        "worldmodel", model=cfg.model_settings, objective=cfg.objective_settings
    )
    assert isinstance(built, WorldModel)
    return built.eval().requires_grad_(False)


def job(env: str, **changes: Any) -> GameJob:
    settings: dict[str, Any] = {
        "task": TaskSpec(steps=2, budget=96),
        "budgets": (24,),
        "episodes": 2,
        "walks": 40,
        "critic_steps": 2,
        "predictor_steps": 0,
        "seed": 0,
        "chunk": 2,
    }
    return GameJob(env=env, model=fresh(env), untrained=fresh(env), **settings | changes)


@pytest.mark.ray
@pytest.mark.slow
def test_all_rows_are_played_by_the_same_episodes(ray_local: None) -> None:
    pytest.importorskip("vizdoom", reason="needs the extra `games`")
    found, pictures = compare(job("my_way_home"))
    assert list(found["rows"]) == list(ROWS)
    for row in found["rows"].values():
        assert list(row) == list(KINDS)
        assert all(0 <= cell["covered"] <= 1 and cell["episodes"] == 2 for cell in row.values())
    # The models are the same, and everything is paired.
    assert found["rows"]["untrained"] == found["rows"]["ours"]
    assert [point["budget"] for point in found["curve"]] == [24, 96]
    assert all(point["plans_per_second"] > 0 for point in found["curve"])
    assert set(pictures) == {"trajectories.png", "budget.png"}
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    lines = "\n".join(table(found))
    assert all(f"\n{row:12} same" in lines for row in ROWS)
    assert {"position", "angle"} == set(found["open_loop"])
    json.dumps(found)


@pytest.mark.ray
@pytest.mark.slow
def test_a_game_without_rooms_has_its_imagination_measured(ray_local: None) -> None:
    pytest.importorskip("ale_py", reason="needs the extra `games`")
    found, pictures = compare(job("breakout"))
    assert set(found["open_loop"]) == {"paddle", "ball"}
    assert "rows" not in found
    assert not pictures
    assert len(table(found)) == 2 * 6


def test_the_command_writes_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        """A run's configuration, of which nothing is read here."""

    seen = []

    def compared(asked: GameJob) -> tuple[dict[str, Any], dict[str, bytes]]:
        seen.append(asked)
        return {"open_loop": {}}, {"budget.png": b"PNG"}

    model = fresh("my_way_home")
    monkeypatch.setattr(plan_job, "load_objective", lambda uri: (model, Run(), {"uri": "there"}))
    monkeypatch.setattr(plan_job, "new_objective", lambda run: model)
    monkeypatch.setattr(plan_job, "compare", compared)
    monkeypatch.setattr(plan_job, "prepare", lambda cfg: cfg)
    cfg = PlanEpisodesConfig(
        checkpoint="run", env="my_way_home", out=str(tmp_path), episodes=3, budgets=(480,)
    )
    found = plan_episodes(cfg)
    assert (seen[0].env, seen[0].episodes, seen[0].budgets) == ("my_way_home", 3, (480,))
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["checkpoint"] == found["checkpoint"] == "there"
    assert written["settings"]["env"] == "my_way_home"
    assert (tmp_path / "budget.png").read_bytes() == b"PNG"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"budgets": (480,)}, "--budgets: is for games"),
        ({"predictor_steps": 3}, "--predictor-steps: is for games"),
        ({"env": "breakout", "control": "run"}, "--control: is for tworooms"),
        ({"env": "my_way_home", "budgets": (3,)}, "--budget: needs at least 96 imagined steps"),
    ],
)
def test_settings_of_another_world_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PlanEpisodesConfig(checkpoint="run", **settings)
