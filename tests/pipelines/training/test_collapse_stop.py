"""When the collapse watch stops the training loop, and when it does not, in one process."""

from __future__ import annotations

import torch

from helpers.pipelines.fake_training import (
    change,
    lines_of,
    memory_batches,
    run_training,
    tiny_config,
)
from pipelines.training.contract import DataSource


# One picture for all samples: every feature is the same, whatever the weights.
def _one_picture(cfg, **where):
    for batch in memory_batches(cfg, **where):
        yield {**batch, "images": torch.full_like(batch["images"], 90)}


SAME = DataSource(_one_picture, 5, "memory-hash")


def test_a_collapsed_run_stops_uncheckpointed_and_says_so(tmp_path):
    cfg = tiny_config(tmp_path, log_every=2, checkpoint_every=3)
    cfg = change(cfg, watch={"action": "stop", "grace_steps": 2, "patience": 2})
    outcome, said = run_training(cfg, tmp_path / "ck", SAME)
    assert outcome.step == 6  # readings at 4 and 6 count, the one at 2 is in the grace period
    assert "--watch.min-std" in outcome.collapsed
    assert "step 6" in outcome.collapsed
    assert said[-2] == outcome.collapsed
    last = lines_of(cfg)[-1]
    assert (last["step"], last["collapsed"]) == (6, True)
    assert [p.name for p in (tmp_path / "ck").iterdir()] == ["checkpoint_00000003"]

    healthy, _ = run_training(change(cfg, run={"name": "healthy"}), tmp_path / "healthy-ck")
    assert (healthy.step, healthy.collapsed) == (12, None)


def test_embeddings_that_collapse_stop_a_run_whose_encoder_has_not(tmp_path):
    cfg = tiny_config(tmp_path, log_every=2, steps=40)
    cfg = change(
        cfg,
        objective={"name": "lejepa", "sigreg_weight": 0.0, "projector": (64, 32)},
        # Nothing but agreement is asked for, and the encoder's own features stay apart.
        optim={"lr": 5e-3},
        watch={"action": "stop", "grace_steps": 2, "patience": 2},
    )
    outcome, _ = run_training(cfg, tmp_path / "ck")
    assert outcome.collapsed is not None
    assert outcome.collapsed.startswith("the embeddings have collapsed")
    assert "--watch.min-embedded-std" in outcome.collapsed
    assert lines_of(cfg)[-1]["std"] > 0.1

    cfg = change(cfg, run={"name": "held"}, objective={"sigreg_weight": 0.5})
    held, _ = run_training(cfg, tmp_path / "held-ck")
    assert (held.step, held.collapsed) == (40, None)


def test_strikes_survive_a_resume(tmp_path):
    cfg = tiny_config(tmp_path, log_every=2)
    cfg = change(cfg, watch={"action": "stop", "grace_steps": 2, "patience": 2})
    run_training(change(cfg, run={"stop_after": 5}), tmp_path / "ck", SAME)
    outcome, _ = run_training(cfg, tmp_path / "ck", SAME)
    assert outcome.step == 6
    assert outcome.collapsed


def test_warn_goes_on_and_off_does_not_look(tmp_path):
    for action, warnings in (("warn", True), ("off", False)):
        cfg = tiny_config(tmp_path, log_every=2, name=action)
        cfg = change(cfg, watch={"action": action, "grace_steps": 0, "patience": 1})
        outcome, said = run_training(cfg, tmp_path / f"{action}-ck", SAME)
        assert (outcome.step, outcome.collapsed) == (12, None)
        assert any("WARNING" in line for line in said) == warnings
        assert any("collapsed" in row for row in lines_of(cfg)) == warnings


def test_a_loss_that_is_not_a_number_stops_the_run_at_once(tmp_path):
    cfg = tiny_config(tmp_path, log_every=1, checkpoint_every=100)
    cfg = change(
        cfg,
        optim={"lr": 1e12, "start_lr": 1e12, "warmup_steps": 0},
        watch={"action": "stop", "grace_steps": 100},
    )
    outcome, _ = run_training(cfg, tmp_path / "ck")
    assert "the loss is" in outcome.collapsed
    assert lines_of(cfg)[-1]["loss"] is None  # metrics.jsonl stays JSON
