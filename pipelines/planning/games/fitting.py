"""Fits on walks what planning in a game needs beside a world model: distance and critic.

Shape suffixes: N states, Z width of a state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from models.planning.costs.critic import Critic, CriticTraining, train_critic
from models.planning.costs.slow_distance import SlowDistance
from models.planning.memory import Memory
from models.planning.world_model.world_model import WorldModel

LAG, FEATURES = 16, 8
"""Steps over which features are to change little, and the slowest that are kept: a turn changes the
whole view, a way into the next room takes about as many steps."""
MEMORY = 6000
"""Transitions that the critic's graph is made of, spread evenly over the walks."""
REACH = 1.5
"""Length of the graph's longest edge, in median steps. Through a wall one sees another picture, so
that a longer edge than in Two-Rooms leads through none."""


def distance_of(model: WorldModel, states: Sequence[torch.Tensor]) -> SlowDistance:
    """Fits the distance of slow features, given the states of each walk."""
    return SlowDistance.fit(states, lag=LAG, most=FEATURES, told=model.told)


def critic_of(model: WorldModel, states: Sequence[torch.Tensor], steps: int, seed: int) -> Critic:
    """Trains the critic on transitions of walks, given the states of each walk."""
    keys_NZ = torch.cat([one[:-1] for one in states])
    following_NZ = torch.cat([one[1:] for one in states])
    kept = torch.linspace(0, len(keys_NZ) - 1, min(MEMORY, len(keys_NZ))).long()
    memory = Memory(len(kept))
    memory.write(keys_NZ[kept], following=following_NZ[kept])
    training = CriticTraining(steps=steps, reach=REACH, told=model.told)
    return train_critic(memory, training, torch.Generator().manual_seed(seed))[0]
