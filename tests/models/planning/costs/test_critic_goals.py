"""A critic that knows that a goal is one picture looks at nothing else of it."""

from __future__ import annotations

import torch

from models.planning.costs.critic import Critic, CriticTraining, train_critic
from models.planning.memory import Memory


def test_what_a_goal_s_picture_does_not_tell_counts_in_the_state_alone() -> None:
    torch.manual_seed(0)
    whole, told = Critic(5), Critic(5, told=2)
    states, goals = torch.randn(7, 5), torch.randn(7, 5)
    other = torch.cat([torch.randn(7, 3), goals[:, 3:]], dim=1)
    assert torch.equal(told(states, goals), told(states, other))
    assert not torch.allclose(whole(states, goals), whole(states, other))
    assert not torch.allclose(
        told(states, goals), told(torch.cat([-states[:, :3], states[:, 3:]], 1), goals)
    )


def test_training_hands_it_on() -> None:
    places = torch.arange(60.0)[:, None] / 10
    memory = Memory(59)
    memory.write(places[:-1].repeat(1, 2), following=places[1:].repeat(1, 2))
    training = CriticTraining(steps=200, goals=40, batch=128, told=1)
    critic, losses = train_critic(memory, training, torch.Generator().manual_seed(0))
    assert critic.told == 1
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
    here, there = torch.zeros(1, 2), torch.tensor([[9.0, 5.0]])  # the first number is not looked at
    near, far = critic(here, torch.tensor([[9.0, 1.0]])), critic(here, there)
    assert far > 2 * near
