"""A policy learns what its examples do, and stands in an agent's place."""

from __future__ import annotations

import torch

from models.planning.actors.policy import Examples, PolicyAgent, PolicyTraining, train_policy


def examples(count: int, seed: int) -> Examples:
    """Steps of length one towards the goal."""
    generator = torch.Generator().manual_seed(seed)
    latents, goals = (torch.randn(count, 2, generator=generator) * 4 for _ in range(2))
    actions = torch.nn.functional.normalize(goals - latents, dim=-1)
    return Examples(latents_ND=latents, goals_ND=goals, actions_NA=actions)


def test_it_does_as_the_examples_do_also_elsewhere() -> None:
    torch.manual_seed(0)
    learned = examples(2000, 0) + examples(2000, 1)
    assert len(learned.actions_NA) == 4000
    policy, losses = train_policy(
        learned, PolicyTraining(steps=400, width=64), torch.Generator().manual_seed(0)
    )
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    new = examples(500, 2)
    said = policy(new.latents_ND, new.goals_ND)
    assert (said - new.actions_NA).square().mean() < 0.05
    assert (said - new.actions_NA.roll(1, 0)).square().mean() > 0.5
    assert not any(p.requires_grad for p in policy.parameters())


def test_it_plans_one_action_within_the_limit() -> None:
    policy, _ = train_policy(
        examples(100, 0), PolicyTraining(steps=2, width=8), torch.Generator().manual_seed(0)
    )
    agent = PolicyAgent(lambda places: places, policy, lambda a: a.clamp(-0.01, 0.01))
    agent.begin(torch.randn(5, 2))
    rows = torch.tensor([4, 1])
    plans = agent.plan(torch.randn(2, 2), rows)
    assert plans.shape == (2, 1, 2)
    assert plans.abs().max() <= 0.01
