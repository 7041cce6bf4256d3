"""Hyperoptimizers by autograd through the update, written from the papers: the tests' reference.

Every level's update is differentiable in its hyperparameters and in nothing else; the derivative of
the next loss by every theta is then whatever autograd says.
"""

from __future__ import annotations

import torch

from models.hyperoptim.tuner import Tuner

ODDS = {"beta1", "beta2", "momentum", "alpha"}
NAMES = {
    "sgd": ("lr", "momentum", "weight_decay"),
    "rmsprop": ("lr", "alpha", "eps", "weight_decay", "momentum"),
    "adam": ("lr", "beta1", "beta2", "eps", "weight_decay"),
    "adamw": ("lr", "beta1", "beta2", "eps", "weight_decay"),
}


def root(v):
    """Square root whose derivative at exactly 0 (nothing has ever moved there) counts as 0."""
    return torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)


def sgd(w, g, state, h, k):
    g = g + h["weight_decay"] * w
    b = h["momentum"] * state.get("b", 0 * w) + g
    return w - h["lr"] * b, {"b": b}


def rmsprop(w, g, state, h, k):
    g = g + h["weight_decay"] * w
    v = h["alpha"] * state.get("v", 0 * w) + (1 - h["alpha"]) * g**2
    b = h["momentum"] * state.get("b", 0 * w) + g / (root(v) + h["eps"])
    return w - h["lr"] * b, {"v": v, "b": b}


def adam(w, g, state, h, k):
    return _adam(w, g + h["weight_decay"] * w, state, h, k)


def adamw(w, g, state, h, k):
    new, state = _adam(w, g, state, h, k)
    return new - h["lr"] * h["weight_decay"] * w, state


def _adam(w, g, state, h, k):
    m = h["beta1"] * state.get("m", 0 * w) + (1 - h["beta1"]) * g
    v = h["beta2"] * state.get("v", 0 * w) + (1 - h["beta2"]) * g**2
    mean, square = m / (1 - h["beta1"] ** k), v / (1 - h["beta2"] ** k)
    return w - h["lr"] * mean / (root(square) + h["eps"]), {"m": m, "v": v}


RULES = {"sgd": sgd, "rmsprop": rmsprop, "adam": adam, "adamw": adamw}


def value(name, base, theta):
    if name in ODDS:
        base = torch.as_tensor(base, dtype=torch.float64)
        return torch.sigmoid(torch.log(base) - torch.log1p(-base) + theta)
    return base * torch.exp(theta)


class Stacked:
    """One level of a stack: groups of tensors that a rule updates.

    Each hyperparameter that the level above tunes is a theta.
    """

    def __init__(self, rule, groups, bases, tuner: Tuner | None):
        self.rule, self.groups, self.bases, self.tuner = rule, groups, bases, tuner
        self.states = [[{} for _ in group] for group in groups]
        self.taken = 0
        self.above = None
        if tuner is not None:
            rows = 1 if tuner.shared else len(groups)
            theta = torch.zeros(rows, len(tuner.tune), dtype=torch.float64, requires_grad=True)
            base = {"beta1": tuner.betas[0], "beta2": tuner.betas[1], **vars(tuner)}
            base = {name: base[name] for name in NAMES[tuner.rule]}
            self.above = Stacked(tuner.rule, [[theta]], [base], tuner.above)

    @property
    def theta(self):
        return self.above.groups[0][0]

    def thetas(self):
        return [] if self.above is None else [self.theta, *self.above.thetas()]

    def step(self, grads, by_theta):
        """Top first; `by_theta` holds None where the last update does not depend on a theta."""
        if self.above is not None and by_theta[0] is not None:
            self.above.step([[by_theta[0]]], by_theta[1:])
            low, high = torch.tensor(self.tuner.bounds, dtype=torch.float64).log()
            theta = self.theta.clamp(low, high)
            # The top of a stack depends on nothing: a leaf.
            self.above.groups = [[theta if theta.requires_grad else theta.requires_grad_()]]
        self.taken += 1
        for i, group in enumerate(self.groups):
            h = dict(self.bases[i])
            for j, name in enumerate(self.tuner.tune if self.tuner else ()):
                theta = self.theta[0 if self.tuner.shared else i, j]
                h[name] = value(name, self.bases[i][name], theta)
            for j, tensor in enumerate(group):
                state = {name: t.detach() for name, t in self.states[i][j].items()}
                group[j], self.states[i][j] = RULES[self.rule](
                    tensor.detach(), grads[i][j].detach(), state, h, self.taken
                )


def reference_step(stack, loss_of):
    """Takes a step.

    Returns:
        The loss and its derivatives by every theta, from the lowest level up.
    """
    for group in stack.groups:
        for j, tensor in enumerate(group):
            group[j] = tensor if tensor.requires_grad else tensor.requires_grad_()
    tensors = [tensor for group in stack.groups for tensor in group]
    loss, thetas = loss_of(tensors), stack.thetas()
    found = torch.autograd.grad(loss, [*tensors, *thetas], allow_unused=True)
    flat, grads = list(found), []
    for group in stack.groups:
        grads.append(flat[: len(group)])
        flat = flat[len(group) :]
    with torch.enable_grad():
        stack.step(grads, flat)
    return loss.item(), flat
