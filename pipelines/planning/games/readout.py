"""Reads places off states: a small network, fitted on walks that the world model never saw.

It measures what states hold. No model and no agent sees a place, and every row of a comparison is
read by the same network. It is fitted to states that were seen and to states that were imagined,
each with the place that was true then: what is imagined is a mean of what may come, which lies
beside all that was seen, and a network that never met one reads it badly.

Shape suffixes: N states, B states of a batch, Z width of a state, P places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from models.planning.descent import descend
from pipelines.planning.games.worlds import F32

WIDTH, DROPOUT = 256, 0.2
"""Of the two hidden layers."""
STEPS, BATCH, LR = 1500, 256, 1e-3
"""Optimizer steps, states of a step, and peak learning rate."""
BETA = 0.1
"""Deviation up to which errors count by their square, in standard deviations; those beyond count
as they are, since a view may fit several places."""


@dataclass(frozen=True, kw_only=True)
class PlaceReadout:
    """The network, with the scales of what it takes and gives."""

    network: nn.Module
    states_2Z: Tensor
    """Mean and standard deviation of the states."""
    places_2P: Tensor
    """Those of the places."""

    def __call__(self, states: Tensor) -> Tensor:
        """Reads places: [..., Z] to [..., P]."""
        (mean_Z, deviation_Z), (centre_P, scale_P) = self.states_2Z, self.places_2P
        places: Tensor = self.network((states - mean_Z) / deviation_Z) * scale_P + centre_P
        return places


def fit_readout(
    states: Sequence[Tensor], places: Sequence[F32], seed: int = 0, steps: int = STEPS
) -> PlaceReadout:
    """Fits the network.

    Args:
        states: seen or imagined, [N, Z] each.
        places: what was true then, [N, P] each; NaN where it is not known, which does not count.
        seed: of the weights and the batches.
        steps: optimizer steps.
    """
    states_NZ = torch.cat(list(states))
    places_NP = torch.from_numpy(np.concatenate(list(places)))
    scales_2Z = torch.stack([states_NZ.mean(0), states_NZ.std(0).clamp(min=1e-3)])
    centre_P = places_NP.nanmean(0)
    scale_P = (places_NP - centre_P).square().nanmean(0).sqrt().clamp(min=1e-3)
    aims_NP = (places_NP - centre_P) / scale_P
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(states_NZ.shape[1], aims_NP.shape[1])

        def loss() -> Tensor:
            drawn_B = torch.randint(len(states_NZ), (BATCH,), generator=generator)
            found_BP = network((states_NZ[drawn_B] - scales_2Z[0]) / scales_2Z[1])
            known_BP = aims_NP[drawn_B].nan_to_num(), ~aims_NP[drawn_B].isnan()
            error_BP = functional.smooth_l1_loss(found_BP, known_BP[0], beta=BETA, reduction="none")
            return (error_BP * known_BP[1]).mean()

        for _ in descend(network.parameters(), loss, steps=steps, lr=LR):
            pass
    return PlaceReadout(
        network=network.eval().requires_grad_(False),
        states_2Z=scales_2Z,
        places_2P=torch.stack([centre_P, scale_P]),
    )


def _network(width: int, places: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, WIDTH),
        nn.SiLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(WIDTH, WIDTH),
        nn.SiLU(),
        nn.Dropout(DROPOUT),
        nn.Linear(WIDTH, places),
    )
