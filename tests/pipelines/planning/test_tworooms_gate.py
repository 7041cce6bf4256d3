"""The gate of docs/planning.md on few episodes, by `pytest -m slow`."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.pipelines.walks import train_on_walks, walk_config
from models.planning.worlds.two_rooms import TwoRooms
from pipelines.plan_episodes import HELD_OUT, PlanEpisodesConfig, make_comparison
from pipelines.planning.episodes import KINDS, draw_tasks
from pipelines.planning.playing import Job, run_job
from pipelines.planning.results import gate, summary
from pipelines.planning.rows import ROWS
from pipelines.planning.studies.studies import succeeded

EPISODES, SEED = 20, 5
NO_REGULARISER = {
    f"{name}_weight": 0.0 for name in ("variance", "covariance", "smoothness", "inverse")
}


@pytest.mark.slow
def test_a_world_model_passes_the_gate_and_one_without_regularisers_does_not(
    tmp_path: Path,
) -> None:
    ours = walk_config(tmp_path, seed=SEED, checkpoint_every=1200)
    control = walk_config(
        tmp_path, objective=NO_REGULARISER, seed=SEED, steps=300, checkpoint_every=300
    )
    cfg = PlanEpisodesConfig(
        checkpoint=train_on_walks(ours, tmp_path / "ours")[1],
        control=train_on_walks(control, tmp_path / "control")[1],
        episodes=EPISODES,
        seed=SEED,
        critic_steps=800,
    )
    parts, facts = make_comparison(cfg)
    tasks = {kind: draw_tasks(TwoRooms(), kind, EPISODES, HELD_OUT + SEED) for kind in KINDS}
    played = {
        row: {
            kind: run_job(parts, Job(row=ROWS[row], tasks=tasks[kind], name=row)) for kind in KINDS
        }
        for row in parts.rows
        if row != "untrained"  # no condition reads it
    }
    reached = succeeded(played)
    found = summary(reached)
    held = gate(found["rows"], facts["open_loop_px"]["model"]["5"])
    assert all(held.values()), (held, found)
    assert found["slow_features"]["cross"]["lift"] > 0.1
    assert found["critic"]["cross"]["lift"] >= 0
    assert all(reached["map"][kind].all() for kind in KINDS)
