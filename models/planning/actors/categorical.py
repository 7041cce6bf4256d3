"""Categorical CEM: searches among choices, such as the buttons of a game, instead of numbers.

    p_h       a distribution over the K choices for every step h of a plan
    sample    S plans; keep the best; p_h := what the best do at step h, mixed with least_chance

It is the cross-entropy method for discrete problems (Rubinstein 1999, *The cross-entropy method for
combinatorial and continuous optimization*). A plan is a row of buttons a step, as for the other
actors; only rows of `choices` are ever proposed. Plans hold a choice for some steps with the chance
`hold`, because single presses move little and independent ones cancel out.

Shape legend: B problems that are solved side by side, S samples of each, H steps of a plan, A
buttons, K choices, E elites.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from models.planning.actors.actor import Score, Search


@dataclass(frozen=True, kw_only=True)
class CategoricalActor:
    """Searches for the best sequence of choices; has the interface of `actor.Actor`."""

    choices_KA: Tensor
    """The rows of buttons that may be pressed."""
    search: Search = field(default_factory=Search)
    hold: float = 0.5
    """Chance that a sampled plan repeats its last choice."""
    least_chance: float = 0.02
    """Chance that every choice keeps at every step, however rarely the best plans take it."""

    def __post_init__(self) -> None:
        K = len(self.choices_KA)
        if not 0 <= self.hold < 1 or not 0 <= self.least_chance * K < 1:
            raise ValueError(
                f"a categorical search needs a chance to hold in [0, 1) and a least chance below "
                f"1/{K}, got {self.hold} and {self.least_chance}"
            )

    def plan(self, score: Score, start_BHA: Tensor, generator: torch.Generator) -> Tensor:
        """Returns the best plans that were found, [B, H, A].

        Args:
            score: gives the cost of plans.
            start_BHA: plans to start from; they are judged among the samples where their steps are
                choices, and other steps (such as zeros after the last one) say nothing.
            generator: of the samples.
        """
        search, K = self.search, len(self.choices_KA)
        choices_KA = self.choices_KA.to(start_BHA.device)
        found_BH, known_BH = self.numbers(start_BHA)
        chance_BHK = start_BHA.new_full((*found_BH.shape, K), 1 / K)
        for _ in range(search.rounds):
            plans_BSH = self.sampled(chance_BHK, search.samples, generator)
            # The best so far takes part, where it is known; elsewhere the sample stands.
            plans_BSH[:, 0] = torch.where(known_BH, found_BH, plans_BSH[:, 0])
            cost_BS = score(choices_KA[plans_BSH])
            ids_BE = cost_BS.topk(search.elites, dim=1, largest=False).indices
            elites_BEH = plans_BSH.gather(1, ids_BE[..., None].expand(-1, -1, plans_BSH.shape[2]))
            found_BH, known_BH = elites_BEH[:, 0], torch.ones_like(known_BH)
            share_BHK = functional.one_hot(elites_BEH, K).to(chance_BHK.dtype).mean(1)
            chance_BHK = (1 - K * self.least_chance) * share_BHK + self.least_chance
        best_BHA: Tensor = choices_KA[found_BH]
        return best_BHA

    def sampled(self, chance_BHK: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """Draws plans as numbers of choices, int64 [B, S, H], on the host."""
        B, H, K = chance_BHK.shape
        chance_RK = chance_BHK.reshape(B * H, K).cpu()
        drawn_RS = torch.multinomial(chance_RK, samples, replacement=True, generator=generator)
        plans_BSH = drawn_RS.view(B, H, samples).transpose(1, 2).contiguous()
        held_BSH = torch.rand(B, samples, H, generator=generator) < self.hold
        for step in range(1, H):
            plans_BSH[:, :, step] = torch.where(
                held_BSH[:, :, step], plans_BSH[:, :, step - 1], plans_BSH[:, :, step]
            )
        return plans_BSH.to(chance_BHK.device)

    def numbers(self, plans_BHA: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the numbers of the choices in plans, int64 [B, H], and where there is one."""
        same_BHK = (plans_BHA[:, :, None] == self.choices_KA.to(plans_BHA.device)).all(-1)
        return same_BHK.long().argmax(-1), same_BHK.any(-1)
