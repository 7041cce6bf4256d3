"""Plans episodes with a trained world model, beside the rows that say what that is worth.

    python -m pipelines.plan_episodes --checkpoint runs/worldmodel_tworooms --episodes 100

Every row meets the same starts and goals: a random policy, an untrained model, the trained one with
shuffled actions, the trained one by distance and by critic, the same search in the true simulator,
and who knows the map. Ray tasks run the episodes. The job writes OUT/results.json,
OUT/trajectories.png, and OUT/agent, which can be served; docs/planning.md says what the numbers
mean.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal, cast

# Lets `python pipelines/plan_episodes.py` work from an uninstalled checkout.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import torch
import tyro

from models.planning.actors.space import ActionSpace
from models.planning.configurator import TaskSpec, configure
from models.planning.costs.critic import CriticTraining, train_critic
from models.planning.memory import Memory
from models.planning.saved_agent import SavedAgent, agent_files
from models.planning.world_model.readout import Readout
from models.planning.world_model.world_model import WorldModel
from models.planning.worlds.two_rooms import SIDE, TwoRooms
from pipelines.config.checks import require
from pipelines.config.places import ReadPlace, WrittenPlace
from pipelines.planning.episodes import KINDS, Episodes, Tasks, draw_tasks
from pipelines.planning.games.job import GameJob, compare
from pipelines.planning.games.job import table as game_table
from pipelines.planning.games.worlds import GAME_WORLDS
from pipelines.planning.imagination import encode_walks, open_loop
from pipelines.planning.picture import Panel, draw
from pipelines.planning.results import gate, summary
from pipelines.planning.rows import ROWS, Comparison, run_row
from pipelines.runs.checkpoints import load_objective, new_objective
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare
from pipelines.runtime.uris import open_uri, write_atomic

WALK_STEPS = 16
"""Transitions of a walk, as `pipelines.fetch tworooms` writes them."""
HELD_OUT = 2**20
"""Added to the seed of what neither critic nor readout is fitted on."""


@dataclass(frozen=True, kw_only=True)
class PlanEpisodesConfig:
    """Plans episodes with a trained world model, beside controls and oracles."""

    checkpoint: ReadPlace
    """Checkpoint of a world model. A run folder stands for its best checkpoint."""
    control: ReadPlace | None = None
    """Checkpoint of a world model that should fail, such as one without regularisers; one more
    row."""
    env: Literal["tworooms", "my_way_home", "breakout"] = "tworooms"
    """The world. The other two are games (docs/planning_games.md)."""
    out: WrittenPlace = "plans"
    """Folder for results.json, trajectories.png and the agent."""
    episodes: int = 100
    """Episodes of every row with start and goal in one room, and as many across rooms."""
    steps: int = 50
    """Steps that an episode may take."""
    method: Literal["cem", "icem", "mppi"] = "cem"
    """How the actor searches."""
    budget: int = 4800
    """Imagined steps that one action may cost."""
    budgets: tuple[int, ...] = ()
    """Games: further budgets of the row with the critic, for success by budget."""
    walks: int = 250
    """Random walks that the critic's memory and the readout of places are fitted on."""
    critic_steps: int = 1500
    """Optimizer steps of the critic."""
    seed: int = 0
    """Seed of starts, goals, walks, critic and search."""
    chunk: int = 25
    """Episodes that one Ray task runs side by side."""

    def __post_init__(self) -> None:
        for flag in ("episodes", "steps", "walks", "critic_steps", "chunk"):
            require(getattr(self, flag) > 0, flag.replace("_", "-"), "must be positive")
        for budget in (self.budget, *self.budgets):
            configure(dataclasses.replace(self.task, budget=budget))
        is_game = self.env in GAME_WORLDS
        require(is_game or not self.budgets, "budgets", "is for games")
        require(not is_game or self.control is None, "control", "is for tworooms")

    @property
    def task(self) -> TaskSpec:
        """What the configurator is told."""
        return TaskSpec(steps=self.steps, budget=self.budget, method=self.method)


def plan_episodes(cfg: PlanEpisodesConfig) -> dict[str, Any]:
    """Runs all rows and writes the results.

    Returns:
        The contents of results.json.

    Raises:
        CheckpointError: There is no such checkpoint, or it does not load.
        ValueError: It is of another objective.
    """
    cfg = prepare(cfg)
    if cfg.env in GAME_WORLDS:
        return _play_game(cfg)
    parts, facts = make_comparison(cfg)
    world = TwoRooms()
    tasks = {kind: draw_tasks(world, kind, cfg.episodes, HELD_OUT + cfg.seed) for kind in KINDS}
    played = _play_all(cfg, parts, tasks)
    reached = {
        row: {kind: played[row, kind][0].reached_B.numpy() for kind in KINDS} for row in parts.rows
    }
    results = {
        **facts,
        **summary(reached),
        "seconds_per_episode": {
            row: sum(played[row, kind][1] for kind in KINDS) / (cfg.episodes * len(KINDS))
            for row in parts.rows
        },
        "settings": dataclasses.asdict(cfg),
    }
    results["gate"] = gate(results["rows"], results["open_loop_px"]["model"]["5"])
    fs, folder = open_uri(cfg.out)
    write_atomic(fs, f"{folder}/results.json", json.dumps(results, indent=1).encode())
    picture = draw(_panels(parts, tasks, played), world)
    write_atomic(fs, f"{folder}/trajectories.png", picture)
    for name, data in agent_files(saved_agent(cfg, parts, facts)).items():
        write_atomic(fs, f"{folder}/agent/{name}", data)
    return results


def _play_game(cfg: PlanEpisodesConfig) -> dict[str, Any]:
    """Compares in a game what plans there, and writes the results."""
    torch.manual_seed(cfg.seed)
    model, run, info = load_objective(cfg.checkpoint)
    job = GameJob(
        env=cfg.env,
        model=_world_model(model, "--checkpoint"),
        untrained=_world_model(new_objective(run), "--checkpoint"),
        task=cfg.task,
        budgets=cfg.budgets,
        **{name: getattr(cfg, name) for name in ("episodes", "walks", "critic_steps")},
        seed=cfg.seed,
        chunk=cfg.chunk,
    )
    found, pictures = compare(job)
    results = {"checkpoint": info["uri"], **found, "settings": dataclasses.asdict(cfg)}
    fs, folder = open_uri(cfg.out)
    write_atomic(fs, f"{folder}/results.json", json.dumps(results, indent=1).encode())
    for name, picture in pictures.items():
        write_atomic(fs, f"{folder}/{name}", picture)
    return results


def saved_agent(cfg: PlanEpisodesConfig, parts: Comparison, facts: dict[str, Any]) -> SavedAgent:
    """Returns the agent of the row `ours_critic`, to be saved."""
    world = TwoRooms()
    return SavedAgent(
        model=cast(WorldModel, parts.model),
        settings=parts.settings,
        critic=parts.critic,
        readout=parts.readout,
        actions=ActionSpace(width=2, longest=world.max_step),
        world=cfg.env,
        frame=(SIDE, SIDE),
        task=cfg.task,
        provenance={"checkpoint": facts["checkpoint"], "seed": cfg.seed},
    )


def make_comparison(cfg: PlanEpisodesConfig) -> tuple[Comparison, dict[str, Any]]:
    """Loads the models, fits readout and critic, and measures what imagination is worth.

    Returns:
        What the rows are made of; and what is measured before any episode.
    """
    torch.manual_seed(cfg.seed)
    model, run, info = load_objective(cfg.checkpoint)
    trained = _world_model(model, "--checkpoint")
    control = None
    if cfg.control is not None:
        control = _world_model(load_objective(cfg.control)[0], "--control")
    generator = torch.Generator().manual_seed(cfg.seed)
    world = TwoRooms()
    places_BT2, _ = world.random_walk(cfg.walks, WALK_STEPS, generator)
    latents_BTD = encode_walks(trained, world, places_BT2)
    memory = Memory(cfg.walks * WALK_STEPS)
    memory.write(latents_BTD[:, :-1].flatten(0, 1), following=latents_BTD[:, 1:].flatten(0, 1))
    start = time.perf_counter()
    critic, _ = train_critic(memory, CriticTraining(steps=cfg.critic_steps), generator)
    seconds = time.perf_counter() - start
    readout = Readout.fit(latents_BTD.flatten(0, 1), places_BT2.flatten(0, 1))
    parts = Comparison(
        model=trained,
        settings={
            "name": run.objective.name,
            "model": run.model_settings,
            "objective": run.objective_settings,
        },
        untrained=_world_model(new_objective(run), "--checkpoint"),
        control=control,
        critic=critic,
        readout=readout,
        config=configure(cfg.task),
        steps=cfg.steps,
        seed=cfg.seed,
    )
    measured = open_loop(trained, readout, world, HELD_OUT + cfg.seed)
    return parts, {"checkpoint": info["uri"], "critic_seconds": seconds, **measured}


def _world_model(objective: torch.nn.Module, flag: str) -> WorldModel:
    if not isinstance(objective, WorldModel):
        raise ValueError(
            f"{flag}: {type(objective).__name__} is no world model.\n"
            "Train one: python -m pipelines.pretrain worldmodel_tworooms"
        )
    return objective.eval().requires_grad_(False)


def _play_all(
    cfg: PlanEpisodesConfig, parts: Comparison, tasks: dict[str, Tasks]
) -> dict[tuple[str, str], tuple[Episodes, float]]:
    """Runs every row on every kind of task, in Ray tasks of `cfg.chunk` episodes."""
    import ray

    from pipelines.runtime.cluster import start_ray

    start_ray()
    shared, remote = ray.put(parts), ray.remote(num_cpus=1)(run_row)
    chunks = [slice(first, first + cfg.chunk) for first in range(0, cfg.episodes, cfg.chunk)]
    # The slowest rows first, so that none of them is left over at the end.
    running = {
        (row, kind): [remote.remote(shared, row, tasks[kind].part(rows)) for rows in chunks]
        for row in reversed(parts.rows)
        for kind in KINDS
    }
    return {key: _joined(ray.get(found)) for key, found in running.items()}


def _joined(found: list[tuple[Episodes, float]]) -> tuple[Episodes, float]:
    names = [field.name for field in dataclasses.fields(Episodes)]
    columns = {
        name: torch.cat([getattr(episodes, name) for episodes, _ in found]) for name in names
    }
    return Episodes(**columns), sum(seconds for _, seconds in found)


def _panels(
    parts: Comparison,
    tasks: dict[str, Tasks],
    played: dict[tuple[str, str], tuple[Episodes, float]],
) -> list[Panel]:
    world, model = TwoRooms(), cast(WorldModel, parts.model)
    panels = []
    for kind in KINDS:
        for row in ("random", "ours", "ours_critic", "oracle_cem"):
            episodes, imagined = played[row, kind][0], list[Any]()
            if row.startswith("ours"):
                with torch.no_grad():
                    starts_BD = model.encode(world.render(tasks[kind].starts_B2))
                    latents = model.rollout(starts_BD, episodes.first_plans_BH2).mean(0)
                    imagined = parts.readout(latents).tolist()
            rate = float(episodes.reached_B.float().mean())
            title = f"{row}, {kind} room: {rate:.0%}"
            panels.append(
                Panel(title=title, tasks=tasks[kind], episodes=episodes, imagined=imagined)
            )
    return panels


def table(results: dict[str, Any]) -> list[str]:
    """Returns the lines that the command prints."""
    if "open_loop_px" not in results:
        return game_table(results)
    lines = [f"{'':12} {'same room':>20} {'across rooms':>20}  seconds an episode"]
    for row, kinds in results["rows"].items():
        cells = [
            f"{of['rate']:6.0%} ({of['interval'][0]:4.0%} to {of['interval'][1]:4.0%})"
            for of in kinds.values()
        ]
        seconds = results["seconds_per_episode"][row]
        lines.append(f"{row:12} {cells[0]:>20} {cells[1]:>20}  {seconds:.2f}  {ROWS[row]}")
    for name, errors in results["open_loop_px"].items():
        told = ", ".join(f"{step}: {error:.2f}" for step, error in errors.items())
        lines.append(f"open-loop error in pixels after steps, {name}: {told}")
    lift = results["critic"]["cross"]
    low, high = lift["interval"]
    lines.append(f"the critic adds {lift['lift']:+.0%} ({low:+.0%} to {high:+.0%}) across rooms")
    lines += [f"{'pass' if held else 'FAIL'}: {name}" for name, held in results["gate"].items()]
    return lines


def main() -> None:
    """Entry point of `python -m pipelines.plan_episodes`."""
    run_command(
        lambda: tyro.cli(PlanEpisodesConfig, description=__doc__),
        lambda cfg: print("\n".join(table(plan_episodes(cfg)))),
    )


if __name__ == "__main__":
    main()
