"""The methods of search at the same numbers of imagined steps, and random shooting beside them."""

from __future__ import annotations

from models.planning.actors.actor import CONTROLS
from models.planning.actors.actor import METHODS as SEARCHES
from pipelines.planning.rows import Row, planner


def _row(method: str) -> Row:
    return Row(
        says=f"`ours_critic`, searching by {method}",
        policy=lambda parts, tasks: planner(parts, tasks, critic=True, method=method),
    )


METHODS = {method: _row(method) for method in (*SEARCHES, *CONTROLS)}
"""The rows of the table in the order in which they are printed."""
