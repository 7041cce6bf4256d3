"""What `pipelines.plan_episodes` can compare: each study runs rows on the same episodes.

A study returns its part of results.json, and files by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipelines.planning.ablations import ABLATIONS, EXAMS
from pipelines.planning.distilling import distil, milliseconds_an_action
from pipelines.planning.episodes import KINDS, Episodes, Tasks, draw_tasks
from pipelines.planning.picture import draw_budgets, draw_episodes
from pipelines.planning.recall import BUDGETS as FEW
from pipelines.planning.recall import RECALL
from pipelines.planning.results import Bools, gate, lifts, rates, share_of, summary
from pipelines.planning.rows import DISTILLED, ROWS, WORLD, Comparison, Each, Job, Row, play

HELD_OUT = 2**20
"""Added to the seed of the episodes that are reported, and of what nothing is fitted on."""
TAUGHT = 2**22
"""Added to the seed of the episodes that a policy is distilled from."""
BUDGETS = (192, 480, 960, 1920, 4800, 9600)
"""Imagined steps an action, for success by budget."""
SEARCHING = ("ours", "ours_critic", "oracle_cem")
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
    chunk: int
    """Episodes that one task runs."""
    each: Each
    """Runs them, such as `pipelines.planning.rows.in_tasks`."""

    def tasks(self, kind: str) -> Tasks:
        """Returns the episodes that are reported."""
        return draw_tasks(WORLD, kind, self.episodes, HELD_OUT + self.parts.seed)

    def run(
        self, rows: Mapping[str, Row], kinds: Sequence[str], budget: int | None = None
    ) -> dict[str, dict[str, tuple[Episodes, float]]]:
        """Runs rows on every kind of episodes; returns episodes and seconds by row and kind."""
        named = [(name, kind) for name in rows for kind in kinds]
        named.reverse()  # the last rows are the slowest; started first, none is left over
        jobs = [Job(row=rows[name], tasks=self.tasks(kind), budget=budget) for name, kind in named]
        found = dict(zip(named, play(self.parts, jobs, self.chunk, self.each), strict=True))
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
    rows = {name: ROWS[name] for name in SEARCHING}
    by_budget = {
        str(budget): rates(succeeded(setting.run(rows, KINDS, budget))) for budget in BUDGETS
    }
    curves = {row: {budget: found[row] for budget, found in by_budget.items()} for row in SEARCHING}
    titles = {"same": "same room", "cross": "across rooms"}
    return {"budgets": curves}, {"budgets.png": draw_budgets(curves, titles)}


def recall(setting: Setting) -> Found:
    """More or less memory, with budgets so small that it matters where a search begins."""
    # Experience is gathered once for all episodes of a row, so they are not divided.
    whole = replace(setting, chunk=setting.episodes)
    found = {}
    for budget in FEW:
        done = succeeded(whole.run(RECALL, ("cross",), budget))
        more = {name: lifts(of, done["last_plan"]) for name, of in done.items()}
        found[str(budget)] = {"rows": rates(done), "beside_last_plan": more}
    return {"recall": found}, {}


def distilled(setting: Setting) -> Found:
    """A policy distilled from the plans of the row `ours_critic`, beside it."""
    seed = TAUGHT + setting.parts.seed
    parts = distil(setting.parts, setting.distilled_from, seed, setting.chunk, setting.each)
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
    "recall": recall,
    "distilled": distilled,
}
"""The studies by name."""
