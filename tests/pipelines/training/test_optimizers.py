"""The trainer with every optimizer: resuming, metrics, when tuning happens, refusals."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn

from helpers.pipelines.fake_training import (
    assert_bitwise,
    change,
    end_of,
    lines_of,
    run_training,
    tiny_config,
)
from models.hyperoptim.optimizer import HyperAdamW
from pipelines.config.optim import OptimConfig
from pipelines.evaluation.report.curves import training_curves
from pipelines.runs.checkpoints import CheckpointError
from pipelines.training import optimizers, trainer
from pipelines.training.optimizers import Combined, averaged, build_optimizer, read_hyperparameters
from pipelines.training.schedules import learning_rate, set_schedules, tunes_at
from pipelines.training.state import load_optimizer, optimizer_tensors

EVERYTHING = ("lr", "beta1", "beta2", "eps", "weight_decay")
SETTINGS = {
    "hyper-adamw": {"tune": EVERYTHING, "hyper_lr": 0.05, "clip_norm": 1.0},
    "muon": {},
    "schedulefree": {},
    "prodigy": {"lr": 1.0, "start_lr": 0.5},
}


def with_optimizer(cfg, name, **optim):
    return change(cfg, optim={"name": name, **SETTINGS.get(name, {}), **optim})


@pytest.mark.parametrize("name", SETTINGS)
def test_stop_and_resume_is_bitwise_the_uninterrupted_run(name, tmp_path):
    cfg = with_optimizer(tiny_config(tmp_path / "whole"), name)
    whole, _ = run_training(cfg, tmp_path / "whole" / "ck")
    assert whole.step == 12
    parts = with_optimizer(tiny_config(tmp_path / "parts"), name)
    run_training(change(parts, run={"stop_after": 7}), tmp_path / "parts" / "ck")
    run_training(parts, tmp_path / "parts" / "ck")
    assert_bitwise(end_of(tmp_path / "parts" / "ck"), end_of(tmp_path / "whole" / "ck"))
    assert lines_of(parts) == lines_of(cfg)


def test_factors_are_1_in_the_warm_up_move_then_and_stay_for_the_last_quarter(tmp_path):
    cfg = with_optimizer(tiny_config(tmp_path, log_every=1), "hyper-adamw", tune=("lr",))
    run_training(cfg, tmp_path / "ck")
    factors = [row["tuned_lr"] / row["lr"] for row in lines_of(cfg)]
    assert factors[:3] == pytest.approx([1.0] * 3, rel=1e-12)  # warmup_steps
    moving = itertools.pairwise(factors[2:9])
    assert all(a != pytest.approx(b, rel=1e-6) for a, b in moving)
    assert factors[9:] == pytest.approx([factors[8]] * 3, rel=1e-12)  # step 9 of 12 was the last
    assert all(row["skipped_steps"] == 0 for row in lines_of(cfg))
    assert [tunes_at(step, cfg.optim, 12) for step in (3, 4, 9, 10)] == [False, True, True, False]


def test_both_groups_share_a_factor_but_have_their_own_schedules(tmp_path):
    cfg = OptimConfig(name="hyper-adamw", tune=("lr", "weight_decay"), lr=0.1, start_lr=0.1)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, cfg)
    for step in range(1, 5):
        rate, decay = set_schedules(optimizer, step, cfg, 10)
        model(torch.ones(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    lr_factor, decay_factor = optimizer.hyper.theta_RH[0].exp().tolist()
    decaying, rest = optimizer.hyperparameters()
    assert decaying["lr"] == rest["lr"] == pytest.approx(rate * lr_factor)
    assert decaying["weight_decay"] == pytest.approx(decay * decay_factor)
    assert rest["weight_decay"] == 0.0
    assert lr_factor != 1
    assert read_hyperparameters(optimizer)["tuned_lr"] == decaying["lr"]


def test_a_skipped_step_is_reported_once_and_counted(tmp_path, monkeypatch):
    clip = trainer._clip

    def poisoned(cfg, state, *, reading):
        norm = clip(cfg, state, reading=reading)
        if state.step == 5:  # the sixth step
            state.objective.encoder.norm.weight.grad.fill_(torch.nan)
        return norm

    monkeypatch.setattr(trainer, "_clip", poisoned)
    cfg = with_optimizer(tiny_config(tmp_path, log_every=2), "hyper-adamw")
    outcome, said = run_training(cfg, tmp_path / "ck")
    assert outcome.step == 12
    assert sum("1 steps skipped" in line for line in said) == 1
    assert [row["skipped_steps"] for row in lines_of(cfg)] == [0, 0, 1, 1, 1, 1]
    tensors = end_of(tmp_path / "ck")[0]
    assert float(tensors["optimizer"][":hyper.steps"]) == 11
    assert all(bool(t.isfinite().all()) for t in tensors["model"].values())


def test_a_checkpoint_of_another_hyperoptimizer_is_refused():
    model = nn.Linear(3, 2)
    saved = build_optimizer(model, OptimConfig(name="hyper-adamw"))
    tensors = optimizer_tensors(model, saved)
    other = build_optimizer(model, OptimConfig(name="hyper-adamw", tune=EVERYTHING))
    with pytest.raises(ValueError, match="theta"):
        load_optimizer(model, other, tensors)
    plain = build_optimizer(model, OptimConfig())
    with pytest.raises(CheckpointError, match="tune themselves"):
        load_optimizer(model, plain, tensors)


def test_muon_takes_the_matrices_and_adamw_the_rest():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 4), nn.LayerNorm(4))

    ours, theirs = network(), network()
    cfg = OptimConfig(name="muon", lr=0.01, weight_decay=0.1, final_weight_decay=0.1)
    combined = build_optimizer(ours, cfg)
    assert isinstance(combined, Combined)
    conv, linear, norm = theirs[0], theirs[2], theirs[3]
    muon = torch.optim.Muon(
        [linear.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW([conv.weight], lr=0.01, weight_decay=0.1, fused=True)
    rest = [conv.bias, linear.bias, norm.weight, norm.bias]
    rest = torch.optim.AdamW(rest, lr=0.01, weight_decay=0.0, fused=True)
    for step in range(3):
        x = torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(step))
        for model, steppers in ((ours, [combined]), (theirs, [muon, adamw, rest])):
            model.zero_grad()
            model(x).square().sum().backward()
            for group in combined.param_groups:
                group["lr"], group["weight_decay"] = 0.01, 0.1 if group["decays"] else 0.0
            for stepper in steppers:
                stepper.step()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, reference)


def test_schedule_free_is_read_at_its_average_and_training_continues_undisturbed():
    cfg = OptimConfig(name="schedulefree", lr=0.1, start_lr=0.1)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, cfg)
    iterates = []
    for step in range(1, 6):
        set_schedules(optimizer, step, cfg, 10)
        model(torch.ones(4, 3) * step).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        iterates.append(optimizer.state[model.weight]["z"].clone())
    trained = model.weight.detach().clone()
    with averaged(optimizer):
        # At one rate all along the iterates weigh alike.
        torch.testing.assert_close(model.weight.detach(), torch.stack(iterates).mean(0))
        assert not torch.allclose(model.weight, trained, rtol=1e-3)
    assert torch.equal(model.weight, trained)
    optimizer.step()  # it refuses outside its training mode


def test_a_checkpoint_holds_the_average_and_the_trained_weights_of_schedule_free(tmp_path):
    cfg = with_optimizer(tiny_config(tmp_path), "schedulefree")
    cfg = change(cfg, objective={"target": "self"}, watch={"action": "off"})
    run_training(cfg, tmp_path / "ck")
    tensors = end_of(tmp_path / "ck")[0]
    name = "encoder.blocks.0.attn.qkv.weight"
    average = tensors["model"][name]
    trained, iterate = (tensors["optimizer"][f"{name}:{of}"] for of in ("trained", "z"))
    beta = cfg.optim.betas[0]
    torch.testing.assert_close(trained, beta * average + (1 - beta) * iterate)
    assert not torch.equal(trained, average)


def test_prodigy_logs_the_rate_it_found_and_schedule_free_does_not_anneal(tmp_path):
    cfg = with_optimizer(tiny_config(tmp_path), "prodigy")
    outcome, _ = run_training(cfg, tmp_path / "ck")
    assert 0 < outcome.metrics["tuned_lr"] < 0.1
    free = OptimConfig(name="schedulefree", warmup_steps=4)
    assert [learning_rate(step, free, 10) for step in (4, 7, 10)] == [free.lr] * 3
    assert learning_rate(10, OptimConfig(warmup_steps=4), 10) == free.final_lr


def test_the_error_for_a_missing_package_names_the_install_command(monkeypatch):
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--optim.name prodigy needs prodigyopt: pip install"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(name="prodigy"))
    assert isinstance(build_optimizer(nn.Linear(2, 2), OptimConfig(name="hyper-adamw")), HyperAdamW)


def test_settings_out_of_range_name_their_flag():
    for flag, settings in {
        "hyper-lr": {"hyper_lr": -1.0},
        "tune-bounds": {"tune_bounds": (2.0, 3.0)},
        "tune-until": {"tune_until": 1.5},
        "eps": {"name": "hyper-adamw", "eps": 0.0},
        "tune": {"name": "hyper-adamw", "tune": ("beta1",), "betas": (0.0, 0.999)},
    }.items():
        with pytest.raises(ValueError, match=f"--optim.{flag}"):
            OptimConfig(**settings)


def test_the_report_draws_what_was_tuned(tmp_path):
    rows = [{"step": s, "loss": 1.0 / s, "lr": 1e-3, "tuned_lr": 1e-3 * s} for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = training_curves(str(tmp_path)).values()
    curves = {curve["title"]: curve for section in drawn for curve in section}
    assert set(curves) == {"Loss", "Learning rate", "Learning rate, tuned"}
    assert curves["Learning rate, tuned"]["last"] == "0.003"
    assert "polyline" in curves["Learning rate, tuned"]["chart"]
