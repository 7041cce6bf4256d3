"""`plan_episodes --env`: all rows are played in the real game, summed up, drawn and written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.pipelines.run_folders import save_untrained
from models.objectives.registry import build_objective
from models.planning.configurator import Rules, TaskSpec
from models.planning.saved_agent import load_agent
from models.planning.world_model.world_model import WorldModel
from pipelines import plan_episodes as plan_job
from pipelines.plan_episodes import PlanEpisodesConfig, plan_episodes
from pipelines.planning.games.job import GameJob, compare, table
from pipelines.planning.games.navigation import KINDS
from pipelines.planning.games.rows import ROWS
from pipelines.planning.games.worlds import GAME_WORLDS, GameWorld
from pipelines.recipes.planning import worldmodel_breakout, worldmodel_doom

RECIPES = {"my_way_home": worldmodel_doom, "breakout": worldmodel_breakout}


def settings_of(env: str) -> dict[str, Any]:
    """What a small model is built from, by the game's recipe."""
    recipe = RECIPES[env]()
    cfg = replace(recipe, objective=replace(recipe.objective, latent_width=8, dynamics_width=16))
    return {
        "name": "worldmodel",
        "model": cfg.model_settings,
        "objective": cfg.objective_settings,
    }


def fresh(env: str) -> WorldModel:
    """A small model with fresh weights, by the game's recipe."""
    torch.manual_seed(0)
    told = settings_of(env)
    built = build_objective("worldmodel", model=told["model"], objective=told["objective"])
    assert isinstance(built, WorldModel)
    return built.eval().requires_grad_(False)


def presses_a_choice(files: dict[str, bytes], folder: Path, world: GameWorld) -> bool:
    """Whether the agent that was saved plans one of the world's choices."""
    for name in ("agent.json", "weights.safetensors"):
        (folder / name).write_bytes(files[f"agent/{name}"])
    saved = load_agent(str(folder))
    agent = saved.agent()
    agent.begin(torch.zeros(1, 3, *world.size, dtype=torch.uint8))
    seen = torch.zeros(1, 3 * saved.model.history, *world.size, dtype=torch.uint8)
    pressed = agent.plan(seen, torch.zeros(1, dtype=torch.int64))[0, 0]
    assert saved.world == world.game
    return tuple(pressed.tolist()) in set(saved.actions.choices or ())


def job(env: str, **changes: Any) -> GameJob:
    settings: dict[str, Any] = {
        "settings": settings_of(env),
        "checkpoint": "there",
        "rules": Rules(),
        "task": TaskSpec(steps=2, budget=96),
        "budgets": (24,),
        "episodes": 2,
        "walks": 120,  # fewer show no goal in the room where an episode starts
        "critic_steps": 2,
        "predictor_steps": 0,
        "seed": 0,
        "chunk": 2,
    }
    return GameJob(env=env, model=fresh(env), untrained=fresh(env), **settings | changes)


@pytest.mark.ray
@pytest.mark.slow
def test_all_rows_are_played_by_the_same_episodes(ray_local: None, tmp_path: Path) -> None:
    pytest.importorskip("vizdoom", reason="needs the extra `games`")
    found, files = compare(job("my_way_home"))
    assert list(found["rows"]) == list(ROWS)
    for row in found["rows"].values():
        assert list(row) == list(KINDS)
        assert all(0 <= cell["covered"] <= 1 and cell["episodes"] == 2 for cell in row.values())
    # The models are the same, and everything is paired.
    assert found["rows"]["untrained"] == found["rows"]["ours"]
    assert [point["budget"] for point in found["curve"]] == [24, 96]
    assert all(point["plans_per_second"] > 0 for point in found["curve"])
    pictures = {name: data for name, data in files.items() if not name.startswith("agent/")}
    assert set(pictures) == {"trajectories.png", "budget.png"}
    assert all(data.startswith(b"\x89PNG") for data in pictures.values())
    assert presses_a_choice(files, tmp_path, GAME_WORLDS["my_way_home"])
    lines = "\n".join(table(found))
    assert all(f"\n{row:12} same" in lines for row in ROWS)
    assert {"position", "angle"} == set(found["open_loop"])
    json.dumps(found)


@pytest.mark.ray
@pytest.mark.slow
def test_a_game_without_rooms_has_its_imagination_measured(ray_local: None, tmp_path: Path) -> None:
    pytest.importorskip("ale_py", reason="needs the extra `games`")
    found, files = compare(job("breakout", walks=40))
    assert set(found["open_loop"]) == {"paddle", "ball"}
    assert "rows" not in found
    assert presses_a_choice(files, tmp_path, GAME_WORLDS["breakout"])
    assert len(table(found)) == 2 * 8 + 2 * 5


def test_the_command_writes_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def compared(asked: GameJob) -> tuple[dict[str, Any], dict[str, bytes]]:
        seen.append(asked)
        return {"open_loop": {}}, {"budget.png": b"PNG"}

    checkpoint = save_untrained(worldmodel_doom(), tmp_path / "run/checkpoint_0")
    monkeypatch.setattr(GameWorld, "shape", lambda world: (*world.size, 7))  # without the engine
    monkeypatch.setattr(plan_job, "compare", compared)
    cfg = PlanEpisodesConfig(
        checkpoint=checkpoint,
        env="my_way_home",
        out=str(tmp_path),
        episodes=3,
        budgets=(480,),
        rules=Rules(horizon=12),
    )
    found = plan_episodes(cfg)
    assert (seen[0].env, seen[0].episodes, seen[0].budgets) == ("my_way_home", 3, (480,))
    assert seen[0].rules.horizon == 12
    assert seen[0].settings["model"]["image_size"] == (48, 64)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["checkpoint"] == found["checkpoint"] == checkpoint
    assert written["settings"]["env"] == "my_way_home"
    assert (tmp_path / "budget.png").read_bytes() == b"PNG"
    other = replace(cfg, env="breakout")
    with pytest.raises(ValueError, match=r"--checkpoint: .* 7 numbers .*\n--env breakout has 64"):
        plan_episodes(other)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"budgets": (480,)}, "--budgets: is for games"),
        ({"predictor_steps": 3}, "--predictor-steps: is for games"),
        ({"recurrent_width": 8}, "--recurrent-width: is for games"),
        ({"env": "my_way_home", "recurrent_width": 8}, "set --predictor-steps as well"),
        ({"env": "breakout", "control": "run"}, "--control: is for tworooms"),
        ({"env": "my_way_home", "budgets": (3,)}, "--budgets: needs at least 96 imagined steps"),
    ],
)
def test_settings_of_another_world_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PlanEpisodesConfig(checkpoint="run", **settings)
