"""The methods of search at the same numbers of imagined steps, and random shooting beside them.

From step to step an agent goes on from its last plan, so that every method improves a plan over
many steps. What a search does within one step shows where nothing is carried along.
"""

from __future__ import annotations

from models.planning.actors.actor import CONTROLS
from models.planning.actors.actor import METHODS as SEARCHES
from pipelines.planning.rows import Row, planner
from pipelines.planning.studies.ablations import without_memory


def _row(method: str) -> Row:
    return Row(
        says=f"`ours_critic`, searching by {method}",
        policy=lambda parts, tasks: planner(parts, tasks, critic=True, method=method),
    )


def _anew(method: str) -> Row:
    return Row(
        says=f"the same by {method}, every step from nothing",
        policy=lambda parts, tasks: planner(
            parts, tasks, critic=True, method=method, change=without_memory
        ),
    )


METHODS = {
    **{method: _row(method) for method in (*SEARCHES, *CONTROLS)},
    **{f"{method}_anew": _anew(method) for method in ("cem", "shooting")},
}
"""The rows of the table in the order in which they are printed."""
