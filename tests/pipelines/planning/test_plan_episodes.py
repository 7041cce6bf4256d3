"""A world model is trained by the trainer, resumes exactly, and plan_episodes reads it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.pipelines.fake_training import run_training, tiny_config
from helpers.pipelines.refusals import teller
from helpers.pipelines.run_folders import save_untrained
from helpers.pipelines.walks import train_on_walks, walk_config
from models.encoders.vit import VisionTransformer
from models.planning.configurator import Rules
from models.planning.saved_agent import load_agent
from models.planning.world_model.world_model import WorldModel
from models.planning.worlds.two_rooms import TwoRooms
from pipelines import plan_episodes as plan_job
from pipelines.plan_episodes import PlanEpisodesConfig, make_comparison, plan_episodes
from pipelines.planning.episodes import KINDS, draw_tasks
from pipelines.planning.playing import Job, Player, in_order, in_tasks
from pipelines.planning.rows import ROWS, Comparison
from pipelines.planning.studies import studies
from pipelines.planning.studies.ablations import ABLATIONS
from pipelines.planning.studies.methods import METHODS
from pipelines.planning.studies.recall import RECALL
from pipelines.planning.studies.tables import table
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


def test_only_a_vit_can_be_exported(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = teller(monkeypatch, capsys)("export", "--checkpoint", checkpoint, "--out", tmp_path)
    assert told.startswith(f"error: --checkpoint: {checkpoint}: a world model with --objective")
    with pytest.raises(CheckpointError, match=r"(?s)has no ViT.*--objective.perception vit"):
        load_encoder(checkpoint)
    cfg = walk_config(tmp_path, objective=TINY | {"perception": "vit"}, steps=2)
    encoder = load_encoder(train_on_walks(cfg, tmp_path / "vit")[1])[0]
    assert isinstance(encoder, VisionTransformer)
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 16, encoder.width)


@pytest.fixture(autouse=True)
def few_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "BUDGETS", (96, 192))
    monkeypatch.setattr(studies, "FEW", (192,))


def here(parts: Comparison, work: Callable, items: Sequence) -> Iterator[tuple[int, Any]]:
    """What Ray's tasks do, in this process, the last one first."""
    for number in reversed(range(len(items))):
        yield number, work(parts, items[number])


def test_all_rows_are_compared_written_and_drawn(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_job, "in_tasks", here)
    tables = ("comparison", "ablations", "budgets", "methods", "recall", "distilled")
    cfg = PlanEpisodesConfig(
        checkpoint=checkpoint, control=checkpoint, out=str(tmp_path), rows=tables, distil=4, **FEW
    )
    found = plan_episodes(cfg)
    written = json.loads((tmp_path / "results.json").read_text())
    assert list(written["rows"]) == list(ROWS)
    assert all(row["same"]["episodes"] == 4 for row in written["rows"].values())
    assert written["gate"] == found["gate"]
    assert set(written["open_loop_px"]["model"]) == {"1", "5", "10", "20"}
    for picture in ("trajectories.png", "budgets.png", "methods.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert load_agent(f"{tmp_path}/agent").provenance["checkpoint"] == checkpoint
    lines = "\n".join(table(found))
    assert all(row in lines for row in {**ROWS, **ABLATIONS, **RECALL, **METHODS})
    assert set(written["disagreement"]["5"]) == {"disagreement", "moved"}  # of two predictors
    assert not (tmp_path / "played").exists()
    # The control is the same checkpoint, and everything is paired.
    assert written["rows"]["control"] == written["rows"]["ours"]
    ablated = written["ablations"]["rows"]
    assert {kind: ablated["whole"][kind] for kind in KINDS} == written["rows"]["ours_critic"]
    assert set(ablated["no_memory"]) == {"same", "cross", "hidden", "zone"}


def test_what_is_compared_can_be_chosen(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_job, "in_tasks", here)
    cfg = PlanEpisodesConfig(
        checkpoint=checkpoint,
        out=str(tmp_path),
        rows=("budgets",),
        rules=Rules(rounds=20),  # needs 120 imagined steps
        **FEW | {"budget": 120},
    )
    found = plan_episodes(cfg)
    assert set(found["budgets"]["ours"]) == {"192"}
    assert "gate" not in found
    assert not (tmp_path / "trajectories.png").exists()
    assert any(line.startswith("ours_critic") for line in table(found))


def test_a_job_that_was_ended_goes_on(
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    played = list[int]()

    def dying_after(count: int) -> Callable[..., Iterator[tuple[int, Any]]]:
        def each(parts: Comparison, work: Callable, items: Sequence) -> Iterator[tuple[int, Any]]:
            for number, found in here(parts, work, items):
                if len(played) == count:
                    raise KeyboardInterrupt
                played.append(number)
                yield number, found

        return each

    def play(name: str, dies_after: int) -> dict[str, Any]:
        played.clear()
        monkeypatch.setattr(plan_job, "in_tasks", dying_after(dies_after))
        out = str(tmp_path / name)
        cfg = PlanEpisodesConfig(checkpoint=checkpoint, out=out, rows=("methods",), **FEW)
        curves = plan_episodes(cfg)["methods"]
        return {
            (row, budget, kind): of[kind]
            for row, points in curves.items()
            for budget, of in points.items()
            for kind in KINDS
        }

    expected, everything = play("whole", 10**6), len(played)
    with pytest.raises(KeyboardInterrupt):
        play("cut", 10)
    assert not (tmp_path / "cut/results.json").exists()
    assert len(list((tmp_path / "cut/played").iterdir())) == 10
    capsys.readouterr()
    assert play("cut", 10**6) == expected
    assert len(played) == everything - 10
    assert capsys.readouterr().out.count(f"[{len(METHODS) * len(KINDS)}/") == 2
    assert not (tmp_path / "cut/played").exists()


@pytest.mark.ray
def test_tasks_play_the_episodes_that_one_process_plays(checkpoint: str, ray_local: None) -> None:
    cfg = PlanEpisodesConfig(checkpoint=checkpoint, **FEW)
    parts, _ = make_comparison(cfg)
    jobs = [
        Job(row=ROWS[row], tasks=draw_tasks(TwoRooms(), kind, cfg.episodes, 0), name=row + kind)
        for row in ("ours", "map")
        for kind in KINDS
    ]
    found, expected = (
        Player(chunk=cfg.episodes, each=each).play(parts, jobs) for each in (in_tasks, here)
    )
    for (episodes, _), (wanted, _) in zip(found, expected, strict=True):
        assert torch.equal(episodes.places_BT2, wanted.places_BT2)
    parted = Player(chunk=3, each=in_tasks).play(parts, jobs[-1:])[0][0]
    assert torch.equal(parted.places_BT2, expected[-1][0].places_BT2)  # joined in their order
    assert in_order(in_tasks(parts, lambda of, item: item**2, [3, 1, 2])) == [9, 1, 4]


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
    assert set(found["tuned_gain"]) == {"same", "cross", "zone"}
    assert any("fewer steps" in line for line in table(found))
    assert found["distilled"]["times_fewer"] > 1
    assert found["distilled"]["rows"]["distilled"]["cross"]["episodes"] == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seed": -1}, r"--seed: must be between"),
        ({"steps": 10**9}, r"--steps: must be 1 to 10,000"),
        ({"budget": 10**9}, r"--budget: at most 1,000,000"),
        ({"env": "my_way_home", "budgets": (3,)}, r"--budgets: needs at least 96"),
        ({"tune": 900}, r"--tune: 900 settings are more than the 864"),
        ({"tune": 500, "budget": 96}, r"--tune: 500 settings are more than the 432"),
    ],
)
def test_numbers_that_cannot_work_are_told_before_anything_is_loaded(
    flags: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PlanEpisodesConfig(checkpoint="none", **flags)


def test_models_of_another_world_are_refused(tmp_path: Path) -> None:
    cfg = walk_config(tmp_path, objective=TINY | {"action_width": 3})
    wide = save_untrained(cfg, tmp_path / "wide/checkpoint_0")
    job = PlanEpisodesConfig(checkpoint=wide, **FEW)
    with pytest.raises(ValueError, match=r"--checkpoint: .* 3 numbers an action\.\n--env tworooms"):
        make_comparison(job)


def test_the_state_of_the_global_generator_stays(checkpoint: str) -> None:
    before = torch.random.get_rng_state()
    make_comparison(PlanEpisodesConfig(checkpoint=checkpoint, **FEW))
    assert torch.equal(before, torch.random.get_rng_state())


def test_other_objectives_are_refused(tmp_path: Path) -> None:
    run_training(tiny_config(tmp_path, steps=4), tmp_path / "run")
    cfg = PlanEpisodesConfig(checkpoint=str(tmp_path / "run/checkpoint_00000004"), **FEW)
    with pytest.raises(ValueError, match=r"--checkpoint: IJEPA is no world model\.\nTrain one"):
        make_comparison(cfg)


def test_a_control_that_cannot_be_read_is_refused_before_anything_is_fitted(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fitting(*_: Any) -> None:
        raise AssertionError("it is fitted already")

    monkeypatch.setattr(plan_job, "fit", fitting)
    cfg = PlanEpisodesConfig(checkpoint=checkpoint, control=str(tmp_path), **FEW)
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run folder"):
        make_comparison(cfg)


def test_what_rows_are_made_of_is_frozen(checkpoint: str) -> None:
    parts, facts = make_comparison(PlanEpisodesConfig(checkpoint=checkpoint, **FEW))
    for network in (parts.trained.model, parts.untrained, parts.trained.critic):
        assert isinstance(network, torch.nn.Module)
        assert not any(p.requires_grad for p in network.parameters())
    assert isinstance(parts.trained.model, WorldModel)
    assert "control" not in parts.rows
    assert facts["checkpoint"] == checkpoint
