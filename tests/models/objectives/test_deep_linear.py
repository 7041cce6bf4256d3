"""Why JEPA ignores noise: the deep-linear theory, to three digits (docs/noise.md).

Littwin et al. 2024, *How JEPA Avoids Noisy Features* (arXiv 2407.03475). The encoder is a product
of L matrices, predictor or decoder is one more, and x and its view y are diagonal up to a rotation:
in eight clean directions y repeats x (rho = 1), in eight noisy ones it keeps rho = 0.6 of it, with
the same covariance. A JEPA that predicts a copy of its own features ends with rho^L of a direction,
an autoencoder of y with rho^(L / (L + 1)).

Targets, copies and distance are those of our objectives, so a gradient that leaks into the target
shows here: the features then vanish.

Shape legend: N samples, D = 16 directions.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from models.objectives.latent import DISTANCES, make_target, update_target

D, RHO = 16, 0.6
NOISY = slice(D // 2, D)
START = 0.45  # of every layer
RATE = 0.05
STEPS = {1: 400, 2: 1200, 3: 3600}


@dataclass(frozen=True)
class Views:
    """N samples whose second moments are exact, and the rotation that hides their directions."""

    x_ND: Tensor
    y_ND: Tensor
    rotation_DD: Tensor


def views() -> Views:
    """x_i and y_i have covariance 1; x has variance 1 / rho, so rho is the regression of y on x."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < 2 * D:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1),
                              torch.cat([hadamard, -hadamard], 1)])  # fmt: skip
    shared_ND, alone_ND = hadamard[:, ::2], hadamard[:, 1::2]
    rho_D = torch.ones(D, dtype=torch.float64)
    rho_D[NOISY] = RHO
    generator = torch.Generator().manual_seed(0)
    rotation_DD = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64)).Q
    x_ND, y_ND = shared_ND / rho_D.sqrt(), shared_ND * rho_D.sqrt() + 0.3 * alone_ND
    return Views(x_ND @ rotation_DD.T, y_ND @ rotation_DD.T, rotation_DD)


def layer(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(D, D, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(START * weight)
    return linear


def encoder(data: Views, layers: int) -> nn.Sequential:
    """The first layer turns the rotation back, so that all layers are diagonal from the start."""
    unit = torch.eye(D, dtype=torch.float64)
    return nn.Sequential(*[layer(data.rotation_DD.T if n == 0 else unit) for n in range(layers)])


@functools.cache
def train(layers: int, kind: str) -> list[tuple[float, float]]:
    """Returns the mean size of clean and noisy directions after every step."""
    data = views()
    network, half = encoder(data, layers), 0.5 * D
    head = layer(data.rotation_DD if kind == "mae" else torch.eye(D, dtype=torch.float64))
    target = network if kind == "leak" else make_target(network)
    sizes = []
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], RATE)
    for _ in range(STEPS[layers]):
        wanted = data.y_ND if kind == "mae" else target(data.y_ND)
        loss = half * DISTANCES["l2"](head(network(data.x_ND)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if kind == "jepa":
            update_target(target, network, momentum=0.0)
        with torch.no_grad():
            size_D = network(data.rotation_DD.T).diagonal()
            sizes.append((float(size_D[: D // 2].mean()), float(size_D[NOISY].mean())))
    return sizes


def halfway(sizes: tuple[float, ...]) -> int:
    middle = (sizes[0] + sizes[-1]) / 2
    return next(step for step, size in enumerate(sizes) if size > middle)


@pytest.mark.parametrize(("kind", "layers"), [*itertools.product(("jepa", "mae"), (1, 2, 3))])
def test_features_end_at_the_size_that_the_theory_says(kind: str, layers: int) -> None:
    clean, noisy = train(layers, kind)[-1]
    power = layers if kind == "jepa" else layers / (layers + 1)
    assert clean == pytest.approx(1.0, abs=5e-4)
    assert noisy == pytest.approx(RHO**power, abs=5e-4)


def test_a_deep_jepa_learns_clean_features_first_and_an_autoencoder_does_not() -> None:
    ratio = {}
    for kind, layers in (("jepa", 1), ("jepa", 3), ("mae", 3)):
        clean, noisy = (halfway(sizes) for sizes in zip(*train(layers, kind), strict=True))
        ratio[kind, layers] = noisy / clean
    assert ratio["jepa", 3] > 1.3
    assert ratio["jepa", 1] < 1
    assert ratio["mae", 3] < 1


def test_without_a_stopped_gradient_everything_vanishes() -> None:
    clean, noisy = train(2, "leak")[-1]
    assert clean < 0.1
    assert noisy < 0.1
