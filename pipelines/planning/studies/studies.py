"""What `pipelines.plan_episodes` can compare: each study runs rows on the same episodes.

A study returns its part of results.json, and files by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.planning.configurator import least_budget
from pipelines.planning.episodes import KINDS, Episodes, Tasks, draw_tasks
from pipelines.planning.picture import draw_budgets, draw_episodes
from pipelines.planning.playing import Job, Player
from pipelines.planning.results import Bools, gate, lifts, rates, share_of, summary
from pipelines.planning.rows import DISTILLED, ROWS, WORLD, Comparison, Row
from pipelines.planning.studies.ablations import ABLATIONS, EXAMS
from pipelines.planning.studies.distilling import distil, milliseconds_an_action
from pipelines.planning.studies.methods import METHODS
from pipelines.planning.studies.recall import BUDGETS as FEW
from pipelines.planning.studies.recall import OFFERED, RECALL
from pipelines.planning.studies.tables import TITLES

HELD_OUT = 2**20
"""Added to the seed of the episodes that are reported, and of what nothing is fitted on."""
TAUGHT = 2**22
"""Added to the seed of the episodes that a policy is distilled from."""
BUDGETS = (96, 192, 288, 480, 960, 1920, 4800)
"""Imagined steps an action, for success by budget; too small ones for the rules are left out."""
SEARCHING = {name: ROWS[name] for name in ("ours", "ours_critic", "oracle_cem")}
"""The rows of success by budget."""

Found = tuple[dict[str, Any], dict[str, bytes]]
"""What a study adds to results.json, and files by name."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What studies are made of."""

    parts: Comparison
    open_loop_px: float
    """The model's open-loop error after five steps, for the gate."""
    episodes: int
    """Episodes of each kind."""
    distilled_from: int
    """Episodes of each kind that a policy is distilled from."""
    player: Player
    """Plays the episodes."""

    def tasks(self, kind: str) -> Tasks:
        """Returns the episodes that are reported."""
        return draw_tasks(WORLD, kind, self.episodes, HELD_OUT + self.parts.seed)

    def run(
        self, rows: Mapping[str, Row], kinds: Sequence[str], budget: int | None = None
    ) -> dict[str, dict[str, tuple[Episodes, float]]]:
        """Runs rows on every kind of episodes; returns episodes and seconds by row and kind."""
        named = [(name, kind) for name in rows for kind in kinds]
        named.reverse()  # the last rows are the slowest; started first, none is left over
        at = "" if budget is None else f", {budget} imagined steps"
        jobs = [
            Job(row=rows[name], tasks=self.tasks(kind), name=f"{name}, {kind}{at}", budget=budget)
            for name, kind in named
        ]
        found = dict(zip(named, self.player.play(self.parts, jobs), strict=True))
        return {name: {kind: found[name, kind] for kind in kinds} for name in rows}


def succeeded(
    played: Mapping[str, Mapping[str, tuple[Episodes, float]]],
) -> dict[str, dict[str, Bools]]:
    """Returns which episodes succeeded, by row and kind."""
    return {
        row: {kind: episodes.succeeded_B.numpy() for kind, (episodes, _) in kinds.items()}
        for row, kinds in played.items()
    }


def comparison(setting: Setting) -> Found:
    """The rows of the gate: floor, controls, ours, and ceilings."""
    rows = {name: ROWS[name] for name in setting.parts.rows}
    played = setting.run(rows, KINDS)
    found = summary(succeeded(played))
    found["seconds_per_episode"] = {
        row: sum(seconds for _, seconds in kinds.values()) / (setting.episodes * len(KINDS))
        for row, kinds in played.items()
    }
    found["gate"] = gate(found["rows"], setting.open_loop_px)
    tasks = {kind: setting.tasks(kind) for kind in KINDS}
    return found, {"trajectories.png": draw_episodes(setting.parts, tasks, played)}


def ablations(setting: Setting) -> Found:
    """The agent less each of its modules."""
    done = succeeded(setting.run(ABLATIONS, EXAMS))
    less = {name: lifts(of, done["whole"]) for name, of in done.items() if name != "whole"}
    return {"ablations": {"rows": rates(done), "beside_whole": less}}, {}


def budgets(setting: Setting) -> Found:
    """Success by imagined steps an action."""
    curves = _curves(setting, SEARCHING)
    return {"budgets": curves}, {"budgets.png": draw_budgets(curves, _titles())}


def methods(setting: Setting) -> Found:
    """Success of the methods of search by imagined steps an action, beside random shooting."""
    curves = _curves(setting, METHODS)
    return {"methods": curves}, {"methods.png": draw_budgets(curves, _titles())}


def _titles() -> dict[str, str]:
    return {kind: TITLES[kind] for kind in KINDS}


def _curves(setting: Setting, rows: Mapping[str, Row]) -> dict[str, Any]:
    """Returns the rates by row and budget, with the decisions a second of one task."""
    curves: dict[str, Any] = {row: {} for row in rows}
    for budget in _enough(setting.parts, BUDGETS):
        played = setting.run(rows, KINDS, budget)
        for row, of in rates(succeeded(played)).items():
            speed = decisions_per_second(played[row].values())
            curves[row][str(budget)] = {**of, "decisions_per_second": speed}
    return curves


def _enough(parts: Comparison, budgets: Sequence[int]) -> list[int]:
    """Returns the budgets that are enough for a search by the rules, or the least that is."""
    least = least_budget(parts.task, parts.rules)
    return [budget for budget in budgets if budget >= least] or [least]


def decisions_per_second(played: Iterable[tuple[Episodes, float]]) -> float:
    """Returns the steps that were taken in a second of CPU time, in all of some episodes."""
    steps, seconds = zip(*((int(of.steps_B.sum()), took) for of, took in played), strict=True)
    return float(sum(steps) / max(sum(seconds), 1e-9))


def recall(setting: Setting) -> Found:
    """More or less memory, with budgets so small that it matters where a search begins."""
    # Experience is gathered once for all episodes of a row, so they are not divided.
    whole = replace(setting, player=replace(setting.player, chunk=setting.episodes))
    found = {}
    rules = setting.parts.rules
    offered = replace(rules, recalled=max(OFFERED, rules.recalled))
    for budget in _enough(replace(setting.parts, rules=offered), FEW):
        done = succeeded(whole.run(RECALL, ("cross",), budget))
        beside = {
            f"beside_{one}": {name: lifts(of, done[one]) for name, of in done.items()}
            for one in ("nothing", "last_plan")
        }
        found[str(budget)] = {"rows": rates(done), **beside}
    return {"recall": found}, {}


def distilled(setting: Setting) -> Found:
    """A policy distilled from the plans of the row `ours_critic`, beside it."""
    seed = TAUGHT + setting.parts.seed
    parts = distil(setting.parts, setting.distilled_from, seed, setting.player)
    rows = {"ours_critic": ROWS["ours_critic"], "distilled": DISTILLED}
    done = succeeded(replace(setting, parts=parts).run(rows, KINDS))
    both = {row: np.concatenate(list(kinds.values())) for row, kinds in done.items()}
    milliseconds = milliseconds_an_action(parts, seed)
    found = {
        "rows": rates(done),
        "of_planner": share_of(both["distilled"], both["ours_critic"]),
        "milliseconds": milliseconds,
        "times_fewer": milliseconds["ours_critic"] / milliseconds["distilled"],
    }
    return {"distilled": found}, {}


STUDIES = {
    "comparison": comparison,
    "ablations": ablations,
    "budgets": budgets,
    "methods": methods,
    "recall": recall,
    "distilled": distilled,
}
"""The studies by name."""
