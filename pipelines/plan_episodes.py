"""Plans episodes with a trained world model, beside the rows that say what that is worth.

    python -m pipelines.plan_episodes --checkpoint runs/worldmodel_tworooms --episodes 100
    python -m pipelines.plan_episodes --checkpoint runs/worldmodel_tworooms --rows ablations budgets

Every row meets the same starts and goals: a random policy, an untrained model, the trained one with
shuffled actions, the trained one by distance and by critic, the same search in the true simulator,
and who knows the map. Other tables are of the agent less each of its modules, of success by budget,
of the methods of search, of what remembered plans are worth, and of a policy distilled from the
plans. Ray tasks run the episodes. The job writes OUT/results.json, pictures, and OUT/agent, which
can be served. What it has played lies in OUT/played until then: a job that was ended goes on when
it is started again. docs/planning.md says what the numbers mean.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal, cast

# Lets `python pipelines/plan_episodes.py` work from an uninstalled checkout.
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import torch
import tyro

from models.planning.actors.space import ActionSpace
from models.planning.configurator import Rules, TaskSpec, configure
from models.planning.costs.critic import Critic
from models.planning.costs.slow_distance import SlowDistance
from models.planning.saved_agent import SavedAgent, agent_files
from models.planning.world_model.readout import Readout
from models.planning.world_model.world_model import WorldModel
from models.planning.worlds.two_rooms import SIDE, TwoRooms
from pipelines.config.checks import require, require_seed
from pipelines.config.places import ReadPlace, WrittenPlace
from pipelines.config.train import PretrainConfig
from pipelines.planning.fitting import check_ablations, fit, unperceived
from pipelines.planning.games.job import GameJob, compare
from pipelines.planning.games.job import table as game_table
from pipelines.planning.games.predictors import with_recurrent_states
from pipelines.planning.games.worlds import GAME_WORLDS
from pipelines.planning.imagination import Distance, disagreement, follows_the_way, open_loop
from pipelines.planning.journal import Journal
from pipelines.planning.loading import frozen, load_world_model
from pipelines.planning.playing import Player, in_tasks
from pipelines.planning.rows import Comparison, Fitted
from pipelines.planning.studies.studies import HELD_OUT, STUDIES, Setting
from pipelines.planning.studies.tables import table
from pipelines.planning.tuning import VALIDATED, draw_candidates, gain, search
from pipelines.runs.checkpoints import new_objective
from pipelines.runtime.errors import run_command
from pipelines.runtime.places import prepare
from pipelines.runtime.uris import join_uri, open_uri, write_atomic

LIMITS = {
    "episodes": (1, 100_000),
    "steps": (1, 10_000),
    "predictor_steps": (0, 10_000_000),
    "recurrent_width": (0, 10_000),
    "tune": (0, 1_000),
    "tune_episodes": (1, 100_000),
    "distil": (2, 100_000),
    "walks": (1, 20_000),
    "critic_steps": (1, 10_000_000),
    "chunk": (1, 100_000),
}
"""Least and greatest numbers of flags. What is beyond is a slip, which would fill the memory."""
WALK_STEPS = 16
"""Transitions of a walk, as `pipelines.fetch tworooms` writes them."""


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
    rows: tuple[
        Literal["comparison", "ablations", "budgets", "methods", "recall", "distilled"], ...
    ] = ("comparison",)
    """What is compared: the rows of the gate, the agent less each of its modules, success by
    budget, the methods of search by budget, more or less memory, and a policy distilled from
    plans."""
    out: WrittenPlace = "plans"
    """Folder for results.json, pictures and the agent."""
    episodes: int = 100
    """Episodes of every row with start and goal in one room, and as many across rooms."""
    steps: int = 50
    """Steps that an episode may take."""
    method: Literal["cem", "icem", "mppi"] = "cem"
    """How the actor searches."""
    budget: int = 4800
    """Imagined steps that one action may cost."""
    predictor_steps: int = 0
    """Games: optimizer steps in which what is behind the model's perception learns on from the
    walks, the perception as it is."""
    recurrent_width: int = 0
    """Games: width of the recurrent states that a model without any is given before that; 0 for
    none."""
    budgets: tuple[int, ...] = ()
    """Games: further budgets of the row `ours`, for success by budget."""
    rules: Rules = field(default_factory=Rules)
    """The numbers that the configurator goes by."""
    tune: int = 0
    """Settings of method and rules that are tried on validation episodes before anything else; the
    best are taken. 0 takes them as they are."""
    tune_episodes: int = 20
    """Validation episodes of each kind that each of them plays."""
    distil: int = 100
    """Episodes of each kind that `--rows distilled` learns from."""
    walks: int = 250
    """Random walks that the critic's memory and the readout of places are fitted on."""
    critic_steps: int = 1500
    """Optimizer steps of the critic."""
    seed: int = 0
    """Seed of starts, goals, walks, critic and search."""
    chunk: int = 25
    """Episodes that one Ray task runs side by side."""

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            value, flag = getattr(self, name), name.replace("_", "-")
            require(least <= value <= most, flag, f"must be {least} to {most:,}, got {value:,}")
        require_seed(self.seed)
        require(len(self.rows) > 0, "rows", "must name at least one table")
        configure(self.task, self.rules)
        for budget in self.budgets:
            try:
                configure(dataclasses.replace(self.task, budget=budget), self.rules)
            except ValueError as error:
                raise ValueError(str(error).replace("--budget:", "--budgets:")) from error
        if self.tune:
            draw_candidates(self.task, self.rules, self.tune, self.seed)
        self._check_env()

    def _check_env(self) -> None:
        is_game = self.env in GAME_WORLDS
        require(is_game or not self.budgets, "budgets", "is for games")
        require(is_game or not self.predictor_steps, "predictor-steps", "is for games")
        require(is_game or not self.recurrent_width, "recurrent-width", "is for games")
        require(
            self.predictor_steps > 0 or not self.recurrent_width,
            "recurrent-width",
            "states of fresh weights tell nothing: set --predictor-steps as well",
        )
        require(not is_game or self.control is None, "control", "is for tworooms")
        require(not is_game or self.rows == ("comparison",), "rows", "is for tworooms")
        require(not is_game or not self.tune, "tune", "is for tworooms")

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
    results: dict[str, Any] = {"settings": dataclasses.asdict(cfg)}
    files: dict[str, bytes] = {}
    parts, facts = make_comparison(cfg)
    results |= facts
    journal = Journal(folder=join_uri(cfg.out, "played"))
    setting = Setting(
        parts=parts,
        open_loop_px=facts["open_loop_px"]["model"]["5"],
        episodes=cfg.episodes,
        distilled_from=cfg.distil,
        player=Player(
            chunk=cfg.chunk,
            each=in_tasks,
            journal=journal,
            tell=functools.partial(print, flush=True),
        ),
    )
    if cfg.tune:
        setting = _tuned(cfg, setting, results)
        parts = setting.parts
    for study in dict.fromkeys(cfg.rows):
        found, drawn = STUDIES[study](setting)
        results, files = results | found, files | drawn
    saved = agent_files(saved_agent(cfg, parts, facts))
    files |= {f"agent/{name}": data for name, data in saved.items()}
    fs, folder = open_uri(cfg.out)
    for name, data in files.items():
        write_atomic(fs, f"{folder}/{name}", data)
    write_atomic(fs, f"{folder}/results.json", json.dumps(results, indent=1).encode())
    journal.remove()
    return results


@torch.random.fork_rng(devices=[])
def _play_game(cfg: PlanEpisodesConfig) -> dict[str, Any]:
    """Compares in a game what plans there, and writes the results."""
    torch.manual_seed(cfg.seed)
    model, run, info = _load(cfg, "--checkpoint", cfg.checkpoint)
    if cfg.recurrent_width:
        model, run = with_recurrent_states(model, run, cfg.recurrent_width)
    job = GameJob(
        env=cfg.env,
        model=model,
        untrained=frozen(new_objective(run)),
        settings=_settings(run),
        checkpoint=info["uri"],
        task=cfg.task,
        rules=cfg.rules,
        budgets=cfg.budgets,
        **{n: getattr(cfg, n) for n in ("episodes", "walks", "critic_steps", "predictor_steps")},
        seed=cfg.seed,
        chunk=cfg.chunk,
    )
    found, files = compare(job)
    results = {"checkpoint": info["uri"], **found, "settings": dataclasses.asdict(cfg)}
    fs, folder = open_uri(cfg.out)
    for name, data in files.items():
        write_atomic(fs, f"{folder}/{name}", data)
    write_atomic(fs, f"{folder}/results.json", json.dumps(results, indent=1).encode())
    return results


def _settings(run: PretrainConfig) -> dict[str, Any]:
    """Returns what a run's model is built from; see `models.planning.saved_agent`."""
    return {
        "name": run.objective.name,
        "model": run.model_settings,
        "objective": run.objective_settings,
    }


def saved_agent(cfg: PlanEpisodesConfig, parts: Comparison, facts: dict[str, Any]) -> SavedAgent:
    """Returns the agent of the row `ours_critic`, to be saved."""
    return SavedAgent(
        model=cast(WorldModel, parts.trained.model),
        settings=parts.settings,
        critic=parts.trained.critic,
        distance=cast(SlowDistance, parts.trained.distance),
        readout=cast(Readout, parts.trained.readout),
        actions=ActionSpace(width=2, longest=TwoRooms().max_step),
        world=cfg.env,
        frame=(SIDE, SIDE),
        task=parts.task,
        rules=parts.rules,
        provenance={"checkpoint": facts["checkpoint"], "seed": cfg.seed},
    )


@torch.random.fork_rng(devices=[])
def make_comparison(cfg: PlanEpisodesConfig) -> tuple[Comparison, dict[str, Any]]:
    """Loads the models, fits readout and critic, and measures what imagination is worth.

    Returns:
        What the rows are made of; and what is measured before any episode.
    """
    control = None if cfg.control is None else _load(cfg, "--control", cfg.control)[0]
    torch.manual_seed(cfg.seed)
    trained, run, info = _load(cfg, "--checkpoint", cfg.checkpoint)
    if "ablations" in cfg.rows:
        check_ablations(trained, "--rows ablations")
    generator = torch.Generator().manual_seed(cfg.seed)
    places_BT2, actions_BT2 = TwoRooms().random_walk(cfg.walks, WALK_STEPS, generator)
    start = time.perf_counter()
    fitted = fit(trained, places_BT2, cfg.critic_steps, generator)
    seconds = time.perf_counter() - start
    untrained = frozen(new_objective(run))
    raw = None
    if "ablations" in cfg.rows:
        raw = unperceived(
            untrained,
            places_BT2,
            actions_BT2,
            steps=run.run.steps,
            critic_steps=cfg.critic_steps,
            generator=generator,
        )
    parts = Comparison(
        trained=fitted,
        settings=_settings(run),
        untrained=untrained,
        control=None if control is None else fit(control, places_BT2, 0, generator),
        task=cfg.task,
        rules=cfg.rules,
        seed=cfg.seed,
        unperceived=raw,
    )
    facts = {"checkpoint": info["uri"], "critic_seconds": seconds}
    return parts, facts | _worth(trained, fitted, HELD_OUT + cfg.seed)


def _worth(trained: WorldModel, fitted: Fitted, seed: int) -> dict[str, Any]:
    """Measures what imagination and the distances are worth, on walks of their own."""
    world = TwoRooms()
    distances: dict[str, Distance] = {
        "latents": lambda here, there: (here - there).norm(dim=-1),
        "slow features": cast(SlowDistance, fitted.distance).between,
        "critic": cast(Critic, fitted.critic),
    }
    return {
        **open_loop(trained, fitted.readout, world, seed),
        "disagreement": disagreement(trained, world, seed),
        "rank_correlation_with_the_way": follows_the_way(trained, distances, world, seed),
    }


def _load(
    cfg: PlanEpisodesConfig, flag: str, uri: str
) -> tuple[WorldModel, PretrainConfig, dict[str, Any]]:
    game = GAME_WORLDS.get(cfg.env)
    there = (SIDE, SIDE, 2) if game is None else game.shape()
    return load_world_model(uri, flag, cfg.env, there)


def _tuned(cfg: PlanEpisodesConfig, setting: Setting, results: dict[str, Any]) -> Setting:
    """Searches for settings and returns the setting of the studies with the best."""
    before = setting.parts
    found = search(
        before,
        candidates=cfg.tune,
        episodes=cfg.tune_episodes,
        seed=cfg.seed,
        out=join_uri(cfg.out, "tuning"),
    )
    after = found[0].applied(before)
    tasks = {kind: setting.tasks(kind) for kind in VALIDATED}
    results["tuned"] = [dataclasses.asdict(candidate) for candidate in found]
    results["tuned_gain"] = gain(before, after, tasks, setting.player)
    return dataclasses.replace(setting, parts=after)


def printed(results: dict[str, Any]) -> list[str]:
    """Returns the lines that the command prints."""
    is_game = results["settings"]["env"] in GAME_WORLDS
    return game_table(results) if is_game else table(results)


def main() -> None:
    """Entry point of `python -m pipelines.plan_episodes`."""
    run_command(
        lambda: tyro.cli(PlanEpisodesConfig, description=__doc__),
        lambda cfg: print("\n".join(printed(plan_episodes(cfg)))),
    )


if __name__ == "__main__":
    main()
