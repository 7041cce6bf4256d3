"""Actors: they search for the actions of least cost, and know nothing of what the cost is made of.

    cem     a normal distribution is moved to its best samples (Rubinstein 1999)
    icem    the same with noise of long waves, and with the best samples kept from one round to the
            next (Pinneri et al. 2020, arXiv 2008.06389)
    mppi    all samples count, weighted by exp(-cost) (Williams et al. 2015, arXiv 1509.01149)
    shooting    the best of all samples, without rounds that learn from each other: a control

Every method imagines `rounds` times `samples` plans.

Shape legend: B problems that are solved side by side, S samples of each, H steps of a plan, A
action width, K elites.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]
"""Maps plans [B, S, H, A] to their costs [B, S]."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """How long and how widely an actor searches."""

    horizon: int = 16
    """H, steps of a plan."""
    samples: int = 100
    """S, plans that are imagined in one round."""
    elites: int = 10
    """K, the best plans, which the next round starts from."""
    rounds: int = 3
    """Rounds of sampling."""
    spread: float = 1.0
    """Standard deviation of the first round's samples, in the units of actions."""
    least_spread: float = 0.05
    """Standard deviation that always remains."""
    temperature: float = 0.1
    """mppi: cost difference that divides a weight by e, as a share of the costs' deviation."""
    waves: float = 2.0
    """icem: exponent of the noise's spectrum over the steps; 0 is white."""
    kept: float = 0.3
    """icem: share of the elites that the next round keeps."""

    def __post_init__(self) -> None:
        whole = min(self.horizon, self.samples, self.elites, self.rounds)
        if whole < 1 or self.elites > self.samples:
            raise ValueError("a search needs positive numbers, and no more elites than samples")


class Searcher(Protocol):
    """What an agent asks of an actor."""

    @property
    def search(self) -> Search:
        """How long and how widely it searches."""
        ...

    def plan(self, score: Score, start_BHA: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the plans that were found, [B, H, A].

        Args:
            score: gives the cost of plans.
            start_BHA: plans to start from, such as what remains of the last ones.
            generator: of the samples.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Actor:
    """Searches by one of the methods of `METHODS` or `CONTROLS`; a `Searcher`."""

    method: str = "cem"
    search: Search = Search()
    limit: Callable[[Tensor], Tensor] = lambda actions: actions
    """Brings actions into the range that is allowed."""

    def plan(self, score: Score, start_BHA: Tensor, generator: torch.Generator) -> Tensor:
        """See `Searcher.plan`."""
        return (METHODS | CONTROLS)[self.method](self, score, start_BHA, generator)


def cem(actor: Actor, score: Score, start_BHA: Tensor, generator: torch.Generator) -> Tensor:
    """The cross-entropy method; see the module."""
    search, mean_BHA = actor.search, start_BHA
    spread_BHA = torch.full_like(mean_BHA, search.spread)
    for _ in range(search.rounds):
        noise_BSHA = white(mean_BHA, search.samples, generator)
        plans_BSHA = actor.limit(mean_BHA[:, None] + spread_BHA[:, None] * noise_BSHA)
        elites_BKHA = best(plans_BSHA, score(plans_BSHA), search.elites)
        mean_BHA = elites_BKHA.mean(1)
        spread_BHA = elites_BKHA.std(1, unbiased=False) + search.least_spread
    return actor.limit(mean_BHA)


def icem(actor: Actor, score: Score, start_BHA: Tensor, generator: torch.Generator) -> Tensor:
    """The improved cross-entropy method; see the module."""
    search, mean_BHA = actor.search, start_BHA
    spread_BHA = torch.full_like(mean_BHA, search.spread)
    kept_BKHA, found_BHA = mean_BHA[:, None], mean_BHA
    for _ in range(search.rounds):
        # What is kept is judged again, so it is part of what the round may imagine.
        fresh = max(search.samples - kept_BKHA.shape[1], 1)
        noise_BSHA = coloured(mean_BHA, fresh, search.waves, generator)
        plans_BSHA = actor.limit(mean_BHA[:, None] + spread_BHA[:, None] * noise_BSHA)
        plans_BSHA = torch.cat([plans_BSHA, kept_BKHA], dim=1)
        elites_BKHA = best(plans_BSHA, score(plans_BSHA), search.elites)
        mean_BHA = elites_BKHA.mean(1)
        spread_BHA = elites_BKHA.std(1, unbiased=False) + search.least_spread
        kept_BKHA = elites_BKHA[:, : max(1, round(search.kept * search.elites))]
        found_BHA = elites_BKHA[:, 0]
    return actor.limit(found_BHA)


def mppi(actor: Actor, score: Score, start_BHA: Tensor, generator: torch.Generator) -> Tensor:
    """Model-predictive path integral control; see the module."""
    search, mean_BHA = actor.search, start_BHA
    for _ in range(search.rounds):
        noise_BSHA = search.spread * white(mean_BHA, search.samples, generator)
        plans_BSHA = actor.limit(mean_BHA[:, None] + noise_BSHA)
        cost_BS = score(plans_BSHA)
        scale_B1 = search.temperature * cost_BS.std(1, keepdim=True).clamp(min=1e-8)
        share_BS = (-(cost_BS - cost_BS.amin(1, keepdim=True)) / scale_B1).softmax(1)
        mean_BHA = (share_BS[:, :, None, None] * plans_BSHA).sum(1)
    return actor.limit(mean_BHA)


def shooting(actor: Actor, score: Score, start_BHA: Tensor, generator: torch.Generator) -> Tensor:
    """Random shooting: the control of a search; see the module."""
    search = actor.search
    noise_BSHA = search.spread * white(start_BHA, search.rounds * search.samples, generator)
    plans_BSHA = actor.limit(start_BHA[:, None] + noise_BSHA)
    return best(plans_BSHA, score(plans_BSHA), 1)[:, 0]


METHODS = {"cem": cem, "icem": icem, "mppi": mppi}
"""Methods of search by name."""
CONTROLS = {"shooting": shooting}
"""What a search has to be better than, by name."""


def best(plans_BSHA: Tensor, cost_BS: Tensor, count: int) -> Tensor:
    """Returns the plans of least cost, the best first, [B, K, H, A]."""
    ids_BK = cost_BS.topk(count, dim=1, largest=False).indices
    ids_BKHA = ids_BK[:, :, None, None].expand(-1, -1, *plans_BSHA.shape[2:])
    elites_BKHA: Tensor = plans_BSHA.gather(1, ids_BKHA)
    return elites_BKHA


def white(like_BHA: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Draws standard normal noise, [B, S, H, A]."""
    B, H, A = like_BHA.shape
    return torch.randn(B, samples, H, A, generator=generator).to(like_BHA.device)


def coloured(like_BHA: Tensor, samples: int, exponent: float, generator: torch.Generator) -> Tensor:
    """Draws noise whose power falls with frequency over the steps, of variance 1, [B, S, H, A]."""
    noise_BSHA = white(like_BHA, samples, generator)
    H = noise_BSHA.shape[2]
    if H < 2 or not exponent:
        return noise_BSHA
    waves_F = torch.fft.rfftfreq(H, device=noise_BSHA.device).clamp(min=1 / H)
    shaped = torch.fft.rfft(noise_BSHA, dim=2) * waves_F[:, None] ** (-exponent / 2)
    coloured_BSHA = torch.fft.irfft(shaped, n=H, dim=2)
    # The variance of white noise is 1 for weights of 1 a frequency, so their mean square divides.
    counted_F = torch.full_like(waves_F, 2.0)
    counted_F[0] = 1.0
    if H % 2 == 0:
        counted_F[-1] = 1.0
    power = (counted_F * waves_F**-exponent).sum() / counted_F.sum()
    scaled_BSHA: Tensor = coloured_BSHA / power.sqrt()
    return scaled_BSHA
