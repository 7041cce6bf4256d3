"""Safety of hyperoptimizers: bounds, gradients that are not finite, resuming, and refusals."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from helpers.models.hyper_cases import CASES, all_of, loss_at, made, stack_of, take
from models.hyperoptim.optimizer import HyperAdam, HyperSGD
from models.hyperoptim.tuner import Tuner


@pytest.mark.parametrize("height", [1, 3])
@pytest.mark.parametrize("case", ["sgd", "rmsprop", "adamw"])
def test_factors_stay_within_their_bounds(case, height):
    tuner = stack_of(height, all_of(case), bounds=(0.8, 1.1))
    tuner = Tuner(**{**vars(tuner), "lr": 0.5})
    params, optimizer = made(case, tuner)
    low, high = math.log(0.8), math.log(1.1)
    touched = False
    for step in range(10):
        take(params, optimizer, step)
        theta = optimizer.hyper.theta_RH
        assert bool((theta >= low).all() and (theta <= high).all())
        touched = touched or bool((optimizer.hyper.inside_RH == 0).any())
        for values in optimizer.hyperparameters():
            assert all(value > 0 for value in values.values())
            assert all(values[name] < 1 for name in ("beta1", "beta2", "alpha") if name in values)
    assert touched


def snapshot(params, optimizer):
    kept = [p.detach().clone() for p in params]
    kept += [t.clone() for state in optimizer.state.values() for t in state.values()]
    return kept + [t.clone() for n, t in optimizer.hyper_tensors().items() if n != "skipped"]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bad", [0, 5])
@pytest.mark.parametrize("case", ["sgd", "rmsprop", "adam", "adamw"])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(case, bad, capturable):
    for tune in (("lr",), all_of(case)):
        runs = []
        for interrupted in (True, False):
            params, optimizer = made(case, stack_of(2, tune), capturable=capturable)
            for step in range(8):
                if interrupted and step == bad:
                    loss_at(99)(params).backward()
                    params[1].grad[0, 0] = math.nan if case == "adam" else math.inf
                    before = snapshot(params, optimizer) if step else None
                    optimizer.step()
                    after = snapshot(params, optimizer)
                    pairs = zip(before or after, after, strict=True)
                    assert all(torch.equal(a, b) for a, b in pairs)
                take(params, optimizer, step)
            assert int(optimizer.skipped) == int(interrupted)
            runs.append(snapshot(params, optimizer))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_from_its_state_is_the_same_run(case):
    tuner = stack_of(3, all_of(case))
    params, optimizer = made(case, tuner)
    for step in range(6):
        take(params, optimizer, step)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others, resumed = made(case, tuner)
    for mine, theirs in zip(others, params, strict=True):
        mine.data.copy_(theirs)
    loaded = torch.load(file, weights_only=True)
    loaded["hyper"] = dict(sorted(loaded["hyper"].items()))  # names decide, not their order
    resumed.load_state_dict(loaded)
    for step in range(6, 12):
        take(params, optimizer, step)
        take(others, resumed, step)
    pairs = zip(snapshot(params, optimizer), snapshot(others, resumed), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    _, shorter = made(case, stack_of(2, all_of(case)))
    with pytest.raises(ValueError, match="another stack"):
        shorter.load_state_dict(optimizer.state_dict())


def test_hyperparameters_do_not_change_while_tuning_is_off():
    params, optimizer = made("adamw", Tuner())
    optimizer.tuning = False
    for step in range(4):
        take(params, optimizer, step)
    assert bool((optimizer.hyper.theta_RH == 0).all())
    assert float(optimizer.level.steps) == 0
    optimizer.tuning = True
    take(params, optimizer, 4)
    assert bool((optimizer.hyper.theta_RH != 0).all())


def test_impossible_settings_are_refused():
    weight = nn.Parameter(torch.ones(2))
    for message, build in {
        "not among": lambda: HyperSGD([weight], tuner=Tuner(tune=("beta1",))),
        "are 0": lambda: HyperSGD([weight], tuner=Tuner(tune=("momentum",))),
        "0 < low": lambda: HyperAdam([weight], tuner=Tuner(bounds=(0.0, 1.0))),
        "eps": lambda: HyperAdam([weight], eps=0.0),
        "beta2": lambda: HyperAdam([weight], betas=(0.9, 1.0)),
        "one dtype": lambda: HyperAdam([weight, nn.Parameter(torch.ones(2).double())]),
    }.items():
        with pytest.raises(ValueError, match=message):
            build()
    optimizer = HyperAdam([weight, nn.Parameter(torch.ones(1))])
    with pytest.raises(RuntimeError, match="all groups"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    weight.sum().backward()
    optimizer.step()  # the second has no gradient, and may have none later either
    optimizer.param_groups[0]["params"][1].grad = torch.ones(1)
    with pytest.raises(RuntimeError, match="at every step or at none"):
        optimizer.step()
