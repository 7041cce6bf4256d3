"""A world model is trained by the trainer, resumes exactly, and plan_episodes reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from helpers.pipelines.fake_training import run_training, tiny_config
from helpers.pipelines.walks import train_on_walks, walk_config
from models.encoders.vit import VisionTransformer
from models.planning.configurator import Rules
from models.planning.saved_agent import load_agent
from models.planning.world_model.world_model import WorldModel
from models.planning.worlds.two_rooms import TwoRooms
from pipelines import plan_episodes as plan_job
from pipelines.plan_episodes import PlanEpisodesConfig, make_comparison, plan_episodes
from pipelines.planning.ablations import ABLATIONS
from pipelines.planning.episodes import KINDS, draw_tasks
from pipelines.planning.recall import RECALL
from pipelines.planning.rows import ROWS, Comparison, Job, in_tasks, play
from pipelines.planning.tables import table
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


def here(parts: Comparison, work: Callable, items: Sequence) -> list:
    """What Ray's tasks do, in this process."""
    return [work(parts, item) for item in items]


def test_all_rows_are_compared_written_and_drawn(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_job, "in_tasks", here)
    tables = ("comparison", "ablations", "budgets", "recall", "distilled")
    cfg = PlanEpisodesConfig(
        checkpoint=checkpoint, control=checkpoint, out=str(tmp_path), rows=tables, distil=4, **FEW
    )
    found = plan_episodes(cfg)
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written["rows"]) == list(ROWS)
    assert all(row["same"]["episodes"] == 4 for row in written["rows"].values())
    assert written["gate"] == found["gate"]
    assert set(written["open_loop_px"]["model"]) == {"1", "5", "10", "20"}
    for picture in ("trajectories.png", "budgets.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert load_agent(f"{tmp_path}/agent").provenance["checkpoint"] == checkpoint
    lines = "\n".join(table(found))
    assert all(row in lines for row in {**ROWS, **ABLATIONS, **RECALL})
    # The control is the same checkpoint, and everything is paired.
    assert written["rows"]["control"] == written["rows"]["ours"]
    ablated = written["ablations"]["rows"]
    assert {kind: ablated["whole"][kind] for kind in KINDS} == written["rows"]["ours_critic"]
    assert set(ablated["no_memory"]) == {"same", "cross", "hidden", "zone"}


def test_what_is_compared_can_be_chosen(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_job, "in_tasks", here)
    cfg = PlanEpisodesConfig(checkpoint=checkpoint, out=str(tmp_path), rows=("budgets",), **FEW)
    found = plan_episodes(cfg)
    assert "gate" not in found
    assert not (tmp_path / "trajectories.png").exists()
    assert any(line.startswith("ours_critic") for line in table(found))


@pytest.mark.ray
def test_tasks_play_the_episodes_that_one_process_plays(checkpoint: str, ray_local: None) -> None:
    cfg = PlanEpisodesConfig(checkpoint=checkpoint, **FEW)
    parts, _ = make_comparison(cfg)
    jobs = [
        Job(row=row, tasks=draw_tasks(TwoRooms(), kind, cfg.episodes, 0))
        for row in (ROWS["ours"], ROWS["map"])
        for kind in KINDS
    ]
    found, expected = (play(parts, jobs, cfg.episodes, each) for each in (in_tasks, here))
    for (episodes, _), (wanted, _) in zip(found, expected, strict=True):
        assert torch.equal(episodes.places_BT2, wanted.places_BT2)
    parted = play(parts, jobs[-1:], 3, in_tasks)[0][0]  # chunks are joined in their order
    assert torch.equal(parted.places_BT2, expected[-1][0].places_BT2)


@pytest.mark.ray
def test_settings_are_searched_and_a_policy_is_distilled(
    checkpoint: str, tmp_path: Path, ray_local: None
) -> None:
    cfg = PlanEpisodesConfig(
        checkpoint=checkpoint,
        out=str(tmp_path),
        rows=("distilled",),
        tune=3,
        tune_episodes=2,
        distil=4,
        **FEW | {"budget": 400},
    )
    found = plan_episodes(cfg)
    steps = [candidate["steps"] for candidate in found["tuned"]]
    assert len(steps) == 3
    assert steps == sorted(steps)
    best = found["tuned"][0]
    saved = load_agent(f"{tmp_path}/agent")
    assert saved.rules == Rules(**best["rules"])
    assert saved.task.method == best["method"]
    assert found["distilled"]["times_fewer"] > 1
    assert found["distilled"]["rows"]["distilled"]["cross"]["episodes"] == 4


def test_other_objectives_are_refused(tmp_path: Path) -> None:
    run_training(tiny_config(tmp_path, steps=4), tmp_path / "run")
    cfg = PlanEpisodesConfig(checkpoint=str(tmp_path / "run/checkpoint_00000004"), **FEW)
    with pytest.raises(ValueError, match=r"--checkpoint: IJEPA is no world model\.\nTrain one"):
        make_comparison(cfg)


def test_what_rows_are_made_of_is_frozen(checkpoint: str) -> None:
    parts, facts = make_comparison(PlanEpisodesConfig(checkpoint=checkpoint, **FEW))
    for network in (parts.trained.model, parts.untrained, parts.trained.critic):
        assert isinstance(network, torch.nn.Module)
        assert not any(p.requires_grad for p in network.parameters())
    assert isinstance(parts.trained.model, WorldModel)
    assert "control" not in parts.rows
    assert facts["checkpoint"] == checkpoint
