"""A world model is trained by the trainer, resumes exactly, and plan_episodes reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.pipelines.fake_training import run_training, tiny_config
from helpers.pipelines.walks import train_on_walks, walk_config
from models.encoders.vit import VisionTransformer
from models.planning.saved_agent import load_agent
from models.planning.world_model.world_model import WorldModel
from models.planning.worlds.two_rooms import TwoRooms
from pipelines import plan_episodes as plan_job
from pipelines.plan_episodes import PlanEpisodesConfig, make_comparison, plan_episodes, table
from pipelines.planning.episodes import KINDS, Tasks, draw_tasks
from pipelines.planning.rows import ROWS, Comparison, run_row
from pipelines.runs.checkpoints import CheckpointError, load_encoder, load_objective

TINY = {"latent_width": 8, "dynamics_width": 16, "ensemble": 2}
FEW = {"episodes": 4, "steps": 3, "budget": 96, "walks": 12, "critic_steps": 3, "chunk": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("world")
    cfg = walk_config(folder, objective=TINY, steps=6, checkpoint_every=3, log_every=2)
    return train_on_walks(cfg, folder / "whole")[1]


def test_a_world_model_resumes_bit_for_bit(checkpoint: str, tmp_path: Path) -> None:
    run = {"steps": 6, "checkpoint_every": 3, "log_every": 2}
    train_on_walks(walk_config(tmp_path, objective=TINY, stop_after=3, **run), tmp_path / "parts")
    outcome, newest = train_on_walks(
        walk_config(tmp_path, objective=TINY, **run), tmp_path / "parts"
    )
    assert outcome.step == 6
    assert {"prediction", "smoothness", "inverse", "latent_std"} <= outcome.metrics.keys()
    whole, parts = (load_objective(uri)[0].state_dict() for uri in (checkpoint, newest))
    assert all(torch.equal(whole[name], value) for name, value in parts.items())


def test_only_a_vit_can_be_exported(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)has no ViT.*--objective.perception vit"):
        load_encoder(checkpoint)
    cfg = walk_config(tmp_path, objective=TINY | {"perception": "vit"}, steps=2)
    encoder = load_encoder(train_on_walks(cfg, tmp_path / "vit")[1])[0]
    assert isinstance(encoder, VisionTransformer)
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 16, encoder.width)


def play_here(cfg: PlanEpisodesConfig, parts: Comparison, tasks: dict[str, Tasks]) -> dict:
    """What Ray's tasks do, in this process."""
    return {(row, kind): run_row(parts, row, tasks[kind]) for row in parts.rows for kind in KINDS}


def test_all_rows_are_compared_written_and_drawn(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_job, "_play_all", play_here)
    cfg = PlanEpisodesConfig(checkpoint=checkpoint, control=checkpoint, out=str(tmp_path), **FEW)
    found = plan_episodes(cfg)
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written["rows"]) == list(ROWS)
    assert all(row["same"]["episodes"] == 4 for row in written["rows"].values())
    assert written["gate"] == found["gate"]
    assert set(written["open_loop_px"]["model"]) == {"1", "5", "10", "20"}
    assert (tmp_path / "trajectories.png").read_bytes().startswith(b"\x89PNG")
    assert load_agent(f"{tmp_path}/agent").provenance["checkpoint"] == checkpoint
    lines = "\n".join(table(found))
    assert all(row in lines for row in ROWS)
    # The control is the same checkpoint, and everything is paired.
    assert written["rows"]["control"] == written["rows"]["ours"]


@pytest.mark.ray
def test_tasks_play_the_episodes_that_one_process_plays(checkpoint: str, ray_local: None) -> None:
    cfg = PlanEpisodesConfig(checkpoint=checkpoint, **FEW | {"chunk": 4})
    parts, _ = make_comparison(cfg)
    tasks = {kind: draw_tasks(TwoRooms(), kind, cfg.episodes, 0) for kind in KINDS}
    found, expected = plan_job._play_all(cfg, parts, tasks), play_here(cfg, parts, tasks)
    assert found.keys() == expected.keys()
    for key, (episodes, _) in expected.items():
        assert torch.equal(found[key][0].places_BT2, episodes.places_BT2), key


def test_other_objectives_are_refused(tmp_path: Path) -> None:
    run_training(tiny_config(tmp_path, steps=4), tmp_path / "run")
    cfg = PlanEpisodesConfig(checkpoint=str(tmp_path / "run/checkpoint_00000004"), **FEW)
    with pytest.raises(ValueError, match=r"--checkpoint: IJEPA is no world model\.\nTrain one"):
        make_comparison(cfg)


def test_what_rows_are_made_of_is_frozen(checkpoint: str) -> None:
    parts, facts = make_comparison(PlanEpisodesConfig(checkpoint=checkpoint, **FEW))
    for network in (parts.model, parts.untrained, parts.critic):
        assert isinstance(network, torch.nn.Module)
        assert not any(p.requires_grad for p in network.parameters())
    assert isinstance(parts.model, WorldModel)
    assert "control" not in parts.rows
    assert facts["checkpoint"] == checkpoint
