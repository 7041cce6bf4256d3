"""Hyperoptimizers compared with autograd through the update and with torch's optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.models.hyper_cases import (
    CASES,
    all_of,
    arguments,
    loss_at,
    made,
    recorded,
    stack_of,
    take,
    weights,
)
from helpers.models.hyper_reference import NAMES, Stacked, reference_step
from models.hyperoptim.adam import Adam
from models.hyperoptim.optimizer import HyperAdam, HyperAdamW, HyperRMSprop, HyperSGD
from models.hyperoptim.tuner import Tuner

TORCH = {
    HyperSGD: torch.optim.SGD,
    HyperRMSprop: torch.optim.RMSprop,
    HyperAdam: torch.optim.Adam,
    HyperAdamW: torch.optim.AdamW,
}
STEPS = 20


def compare(case, height, monkeypatch, *, steps=STEPS, shared=False, capturable=None):
    tuner = stack_of(height, all_of(case), shared=shared)
    seen = recorded(monkeypatch)
    params, optimizer = made(case, tuner, capturable=capturable)
    base = CASES[case][1]
    other = {**base, "lr": base["lr"] / 2, "weight_decay": base["weight_decay"] * 2}
    rule = case.split()[0]
    stack = Stacked(rule, weights(), [base, other], tuner)
    for step in range(steps):
        before = len(seen)
        ours = take(params, optimizer, step)
        theirs, by_theta = reference_step(stack, loss_at(step))
        assert ours == pytest.approx(theirs, rel=1e-9)
        expected = [h for h in by_theta if h is not None]
        got = seen[before] if len(seen) > before else []
        if capturable:  # every level is called, the gate says whether it counts
            got = got[: len(expected)]
        assert len(got) == len(expected)
        # At k = 1 the betas' derivatives are exactly 0 and both sides round: hence the absolute
        # part.
        for mine, reference in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-13)
    moved = optimizer.hyper.theta_RH.abs()
    assert bool((moved > 1e-4).all())
    return optimizer


@pytest.mark.parametrize("height", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_hypergradients_of_every_hyperparameter_equal_autograd(case, height, monkeypatch):
    compare(case, height, monkeypatch)


@pytest.mark.parametrize("case", ["sgd", "rmsprop", "rmsprop without momentum", "adam", "adamw"])
def test_capturable_hypergradients_equal_autograd(case, monkeypatch):
    compare(case, 3, monkeypatch, capturable=True)


def test_hypergradients_of_groups_that_share_a_factor_equal_autograd(monkeypatch):
    optimizer = compare("adamw", 2, monkeypatch, shared=True)
    assert optimizer.hyper.theta_RH.shape == (1, 5)
    first, second = (values["lr"] for values in optimizer.hyperparameters())
    assert first == pytest.approx(2 * second, rel=1e-12)


def test_a_hypergradient_of_the_wrong_sign_is_noticed(monkeypatch):
    right = Adam.hypergradients

    def wrong(self, *arguments):
        return {name: -value for name, value in right(self, *arguments).items()}

    monkeypatch.setattr(Adam, "hypergradients", wrong)
    with pytest.raises(AssertionError):
        compare("adamw", 1, monkeypatch)


def test_after_one_step_the_betas_of_adam_do_not_matter_yet(monkeypatch):
    """At k = 1, m / c1 = g and v / c2 = g^2 for any betas, so their derivatives are 0."""
    seen = recorded(monkeypatch)
    params, optimizer = made("adamw", stack_of(1, NAMES["adamw"]))
    take(params, optimizer, 0)
    assert seen == []  # no update yet to differentiate
    take(params, optimizer, 1)
    by_name = dict(zip(NAMES["adamw"], seen[0][0].T, strict=True))
    assert by_name["beta1"].abs().max() < 1e-15
    assert by_name["beta2"].abs().max() < 1e-15
    assert by_name["lr"].abs().min() > 1e-6


@pytest.mark.parametrize("tuned", [True, False], ids=["hyper-lr 0", "no tuner"])
@pytest.mark.parametrize("case", CASES)
def test_with_hyper_lr_0_updates_equal_torchs_optimizer_bitwise(case, tuned):
    tuner = Tuner(lr=0.0, tune=all_of(case)) if tuned else None
    params, optimizer = made(case, tuner, torch.float32)
    kind, base = CASES[case]
    others = [nn.Parameter(w) for group in weights(torch.float32) for w in group]
    other = {"lr": base["lr"] / 2, "weight_decay": base["weight_decay"] * 2}
    fused = {"fused": True} if "adam" in case else {"foreach": True}
    torchs = TORCH[kind](
        [{"params": others[:2]}, {"params": others[2:], **other}], **arguments(base), **fused
    )
    for step in range(STEPS):
        take(params, optimizer, step)
        take(others, torchs, step)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("case", ["sgd", "rmsprop", "adam", "adamw"])
def test_lr_alone_needs_no_buffer_that_torchs_optimizer_does_not_have(case):
    params, optimizer = made(case, Tuner())
    take(params, optimizer, 0)
    kept = {name for state in optimizer.state.values() for name in state}
    assert kept <= {"exp_avg", "exp_avg_sq", "square_avg", "momentum_buffer"}


def test_hypergradients_of_upper_levels_equal_autograd_at_a_bound(monkeypatch):
    seen = recorded(monkeypatch)
    tuner = stack_of(2, ("lr",), bounds=(0.98, 1.02))
    params, optimizer = made("adamw", tuner)
    base = CASES["adamw"][1]
    other = {**base, "lr": base["lr"] / 2, "weight_decay": base["weight_decay"] * 2}
    stack = Stacked("adamw", weights(), [base, other], tuner)
    for step in range(10):
        take(params, optimizer, step)
        _, by_theta = reference_step(stack, loss_at(step))
        if step > 1:
            for mine, reference in zip(seen[-1], by_theta, strict=True):
                torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-13)
    assert bool((optimizer.hyper.inside_RH == 0).any())


def test_tuning_scales_a_schedule_and_differentiates_by_the_last_rate(monkeypatch):
    """A schedule sets the next rate before the step; the derivative is by the rate last used."""
    seen = recorded(monkeypatch)
    params, optimizer = made("adamw", stack_of(1, ("lr",)))
    base = CASES["adamw"][1]
    other = {**base, "weight_decay": base["weight_decay"] * 2}
    stack = Stacked("adamw", weights(), [dict(base), other], stack_of(1, ("lr",)))
    for step in range(8):
        rate = 0.02 * (step + 1) / 8
        for group, of_stack in zip(optimizer.param_groups, stack.bases, strict=True):
            group["lr"] = of_stack["lr"] = rate
        take(params, optimizer, step)
        _, by_theta = reference_step(stack, loss_at(step))
        if step:
            torch.testing.assert_close(seen[-1][0], by_theta[0], rtol=1e-6, atol=1e-13)
        for row, values in enumerate(optimizer.hyperparameters()):
            factor = float(optimizer.hyper.theta_RH[row, 0].exp())
            assert values["lr"] == pytest.approx(rate * factor, rel=1e-12)


def test_a_rate_that_is_far_too_low_is_raised():
    losses = {}
    for tuned in (True, False):
        tuner = Tuner(lr=0.1, bounds=(1.0, 1e6)) if tuned else None
        params = [nn.Parameter(w) for group in weights() for w in group]
        optimizer = HyperAdam(params, lr=1e-6, tuner=tuner)
        losses[tuned] = [take(params, optimizer, step % 4) for step in range(120)][-1]
    assert losses[True] < 0.7 * losses[False]
