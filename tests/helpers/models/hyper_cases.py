"""What the hyperoptimizers' tests share: every optimizer, its hyperparameters, a small problem."""

from __future__ import annotations

import torch
from torch import nn

from helpers.models.hyper_reference import NAMES
from models.hyperoptim.optimizer import HyperAdam, HyperAdamW, HyperRMSprop, HyperSGD
from models.hyperoptim.tuner import Level, Tuner

BETAS = {"beta1": 0.8, "beta2": 0.95}
CASES = {
    "sgd": (HyperSGD, {"lr": 0.1, "momentum": 0.7, "weight_decay": 0.02}),
    "sgd without momentum": (HyperSGD, {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.02}),
    "rmsprop": (
        HyperRMSprop,
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.02, "momentum": 0.6},
    ),
    "rmsprop without momentum": (
        HyperRMSprop,
        {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.02, "momentum": 0.0},
    ),
    "adam": (HyperAdam, {"lr": 0.02, **BETAS, "eps": 1e-3, "weight_decay": 0.02}),
    "adamw": (HyperAdamW, {"lr": 0.02, **BETAS, "eps": 1e-3, "weight_decay": 0.05}),
}


def all_of(case):
    """Every hyperparameter of a case that can move."""
    return tuple(name for name, base in CASES[case][1].items() if name != "momentum" or base)


def arguments(base):
    """A base as the optimizer's constructor takes it."""
    rest = {name: value for name, value in base.items() if not name.startswith("beta")}
    return rest | ({"betas": (base["beta1"], base["beta2"])} if "beta1" in base else {})


def stack_of(height, tune, **options):
    """Tuners that tune everything below: adam, above it rmsprop, above it sgd with momentum."""
    third = Tuner(rule="sgd", lr=1e-3, momentum=0.5, tune=NAMES["rmsprop"])
    second = Tuner(
        rule="rmsprop",
        lr=1e-3,
        alpha=0.8,
        momentum=0.3,
        weight_decay=0.01,
        eps=1e-6,
        tune=NAMES["adam"],
        above=third if height > 2 else None,
    )
    return Tuner(
        lr=0.02,
        betas=(0.7, 0.9),
        eps=1e-6,
        weight_decay=0.01,
        tune=tune,
        above=second if height > 1 else None,
        **options,
    )


def weights(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [[(6, 5), (5, 2)], [(5,), (2,)]]
    return [
        [torch.randn(shape, generator=generator, dtype=dtype) * 0.5 for shape in group]
        for group in shapes
    ]


def loss_at(step):
    """A batch's loss of a small network as a function of its four tensors."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(8, 2, generator=generator, dtype=torch.float64)

    def loss(tensors):
        first, second, bias, shift = tensors
        hidden = torch.tanh(x.to(first.dtype) @ first + bias)
        return (hidden @ second + shift - y.to(first.dtype)).square().mean()

    return loss


def made(case, tuner, dtype=torch.float64, **options):
    """Parameters in two groups, of another rate and decay each, and their optimizer."""
    kind, base = CASES[case]
    params = [[nn.Parameter(w) for w in group] for group in weights(dtype)]
    other = {"lr": base["lr"] / 2, "weight_decay": base["weight_decay"] * 2}
    groups = [{"params": params[0]}, {"params": params[1], **other}]
    return [*params[0], *params[1]], kind(groups, **arguments(base), tuner=tuner, **options)


def take(params, optimizer, step):
    optimizer.zero_grad()
    loss = loss_at(step)(params)
    loss.backward()
    optimizer.step()
    return loss.item()


def recorded(monkeypatch):
    """What each level of a stack is given, step by step, from the lowest up."""
    seen, depth = [], [0]
    original = Level.step

    def step(self, by_theta, gate):
        if depth[0] == 0:
            seen.append([])
        seen[-1].append(by_theta.clone())
        depth[0] += 1
        original(self, by_theta, gate)
        depth[0] -= 1

    monkeypatch.setattr(Level, "step", step)
    return seen
