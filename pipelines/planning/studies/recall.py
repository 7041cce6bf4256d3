"""What remembered plans are worth: the same agent with small budgets and more or less memory."""

from __future__ import annotations

import dataclasses

from models.planning.agent import Agent
from pipelines.planning.episodes import Policy, Tasks, agent_policy, draw_tasks, run_episodes
from pipelines.planning.rows import WORLD, Comparison, Row, planner
from pipelines.planning.studies.ablations import without_memory

BUDGETS = (192, 288, 480, 960, 4800)
"""Imagined steps an action: from so few that it matters where the search begins, up to enough."""
OFFERED = 4
"""Remembered plans that the search is offered."""
EARLIER = 50
"""Episodes that the experienced agent has been through before."""
OTHER_SEED = 7_654_321
"""Added to the seed of the episodes that the agent has been through."""


def _recalling(parts: Comparison, tasks: Tasks, earlier: int) -> Policy:
    made = list[Agent]()
    rules = dataclasses.replace(parts.rules, recalled=OFFERED)
    policy = planner(parts, tasks, critic=True, rules=rules, change=made.append)
    if not earlier:
        return policy
    before = draw_tasks(WORLD, "cross", earlier, OTHER_SEED + parts.seed)
    run_episodes(WORLD, agent_policy(made[0], WORLD.render, before), before, parts.task.steps)
    return agent_policy(made[0], WORLD.render, tasks)


RECALL = {
    "nothing": Row(
        says="no memory: every search begins with standing still",
        policy=lambda parts, tasks: planner(parts, tasks, critic=True, change=without_memory),
    ),
    "last_plan": Row(
        says="the search begins with what remains of the last plan",
        policy=lambda parts, tasks: planner(parts, tasks, critic=True),
    ),
    "similar_plans": Row(
        says=f"or with the best of {OFFERED} plans made in similar situations, of these episodes",
        policy=lambda parts, tasks: _recalling(parts, tasks, 0),
    ),
    "experience": Row(
        says=f"the same, after {EARLIER} other episodes",
        policy=lambda parts, tasks: _recalling(parts, tasks, EARLIER),
    ),
}
"""The rows of the table in the order in which they are printed."""
