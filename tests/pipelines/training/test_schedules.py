"""Schedules against closed forms, and the two parameter groups of the optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipelines.config.optim import OptimConfig
from pipelines.training.optimizers import build_optimizer
from pipelines.training.schedules import learning_rate, set_schedules, weight_decay

CFG = OptimConfig(
    lr=1e-3,
    start_lr=2e-4,
    final_lr=1e-6,
    warmup_steps=25_000,
    weight_decay=0.04,
    final_weight_decay=0.4,
)
TOTAL = 187_500


def test_learning_rate_at_the_start_peak_and_end_of_the_papers_run():
    assert learning_rate(0, CFG, TOTAL) == 2e-4
    assert learning_rate(12_500, CFG, TOTAL) == pytest.approx(6e-4, rel=1e-12)
    assert learning_rate(25_000, CFG, TOTAL) == 1e-3
    middle = (25_000 + TOTAL) // 2
    assert learning_rate(middle, CFG, TOTAL) == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-4)
    assert learning_rate(TOTAL, CFG, TOTAL) == 1e-6


def test_first_step_has_already_moved_by_one_warmup_increment():
    # The original advances its schedule before the optimizer's first step.
    assert learning_rate(1, CFG, TOTAL) == pytest.approx(2e-4 + 8e-4 / 25_000, rel=1e-12)


def test_weight_decay_is_a_half_cosine_over_the_whole_run():
    assert weight_decay(0, CFG, TOTAL) == 0.04
    assert weight_decay(TOTAL, CFG, TOTAL) == 0.4
    quarter = 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi / 4))
    assert weight_decay(TOTAL // 4, CFG, TOTAL) == pytest.approx(quarter, rel=1e-12)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 10), (10, 10), (1, 1)])
def test_no_warmup_all_warmup_and_a_single_step_stay_finite_and_end_where_they_should(
    warmup, total
):
    cfg = OptimConfig(warmup_steps=warmup)
    rates = [learning_rate(step, cfg, total) for step in range(total + 1)]
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)
    # A run that is all warm-up ends at the peak; any other ends at the final rate.
    assert rates[-1] == (cfg.lr if warmup == total else cfg.final_lr)


def test_schedules_are_pure_functions_of_the_step():
    forwards = [learning_rate(s, CFG, TOTAL) for s in range(0, TOTAL, 9973)]
    backwards = [learning_rate(s, CFG, TOTAL) for s in reversed(range(0, TOTAL, 9973))]
    assert forwards == backwards[::-1]


class _Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_biases_and_norms_do_not_decay_mask_tokens_do_and_frozen_weights_are_left_out():
    model = _Tiny()
    optimizer = build_optimizer(model, CFG)
    decaying, rest = (group["params"] for group in optimizer.param_groups)
    assert {id(p) for p in decaying} == {id(model.linear.weight), id(model.mask_token)}
    assert {id(p) for p in rest} == {
        id(model.linear.bias),
        id(model.norm.weight),
        id(model.norm.bias),
    }
    rate, decay = set_schedules(optimizer, 25_000, CFG, TOTAL)
    assert [g["lr"] for g in optimizer.param_groups] == [rate, rate] == [1e-3, 1e-3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [decay, 0.0]
    assert decay > 0.04
