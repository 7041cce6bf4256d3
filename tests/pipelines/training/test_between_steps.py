"""Step numbers passed to slices, momentum and checkpoints, which comparing resumes cannot check."""

from __future__ import annotations

import pytest
import torch

from helpers.pipelines.fake_training import change, end_of, run_training, tiny_config
from models.objectives.latent import LatentPrediction
from models.objectives.registry import build_objective
from pipelines.runs.checkpoints import CheckpointState, save_checkpoint
from pipelines.training.state import new_state

CPU = torch.device("cpu")
SMALL = {"projector": (32, 16), "slices": 16}


def _objective(folder, **objective):
    cfg = change(tiny_config(folder), objective={**SMALL, **objective})
    settings = cfg.objective_settings
    return build_objective(cfg.objective.name, model=cfg.model_settings, objective=settings)


@pytest.mark.parametrize(
    "settings",
    [{"name": "lejepa"}, {"name": "ijepa", "regularize": "context_pooled"}],
    ids=["lejepa", "regularized"],
)
def test_every_step_draws_other_slices(tmp_path, settings):
    objective = _objective(tmp_path, **settings)
    seen = [objective.sigreg.draw_slices(16)]
    for step in range(3):
        assert objective.sigreg.step.item() == step
        objective.after_step(step, 10)
        seen.append(objective.sigreg.draw_slices(16))
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_regularized_objective_still_moves_its_target(tmp_path):
    objective = _objective(tmp_path, name="ijepa", regularize="context_pooled")
    target = objective.feature_encoder.norm.bias
    with torch.no_grad():
        objective.objective.encoder.norm.bias.add_(1.0)
    objective.after_step(0, 10)
    torch.testing.assert_close(target, torch.full_like(target, 0.1))  # momentum 0.9 at step 0


@pytest.mark.parametrize("stops", [(6,), (2, 6)], ids=["at once", "resumed"])
def test_the_momentum_counts_steps_from_0_also_after_a_resume(tmp_path, monkeypatch, stops):
    told = []
    moved = LatentPrediction.after_step

    def after_step(self, step, total_steps):
        told.append((step, total_steps))
        moved(self, step, total_steps)

    monkeypatch.setattr(LatentPrediction, "after_step", after_step)
    for stop in stops:
        run_training(tiny_config(tmp_path, stop_after=stop), tmp_path / "ck")
    assert told == [(step, 12) for step in range(6)]


def test_a_checkpoint_says_its_position_in_samples_and_epochs(tmp_path):
    run_training(tiny_config(tmp_path), tmp_path / "ck")
    for step in (4, 8, 12):
        state = end_of(tmp_path / "ck", step)[1]
        assert (state["step"], state["position"], state["epoch"]) == (step, 8 * step, step / 5)


def test_the_random_generator_continues_where_it_stopped(tmp_path):
    cfg = tiny_config(tmp_path)
    state = new_state(cfg, CPU)
    torch.rand(17)  # as an objective that draws in its steps would
    saved = CheckpointState(step=4, position=32, epoch=0.8, manifest_hash="memory-hash")
    save_checkpoint(tmp_path, state.tensors(), saved, cfg)
    expected = torch.rand(5)
    other = new_state(cfg, CPU)  # which seeds the generator
    other.restore(tmp_path, rank=0, world_size=1)
    assert torch.equal(torch.rand(5), expected)
