"""Two-Rooms: a point moves in a square that a wall with one door divides. Batched, in torch.

The smallest world in which planning differs from going straight: the way to a goal in the other
room leads through the door. After the environments of PLDM (Sobal et al. 2025, arXiv 2502.14819),
at 32 pixels and with a wall that stays where it is.

Shape legend: B points, T steps, 2 = (x, y) in pixels, x to the right and y downwards, H = W = 32
pixels. Pixel i covers [i, i + 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 32
"""Pixels on a side of the picture."""
DOT = 1.2
"""Standard deviation of the dot that shows the point, pixels."""
REACHED = 2.0
"""A goal counts as reached at less than this distance, pixels."""
TURN = 0.6
"""Standard deviation of the change of heading of a random walk in one step, radians."""


@dataclass(frozen=True, kw_only=True)
class TwoRooms:
    """The world: where the wall stands, and how points move. It has no state of its own."""

    wall: tuple[float, float] = (15.0, 17.0)
    """Left and right face of the wall, pixels. It is thicker than a step, so nothing jumps it."""
    door: tuple[float, float] = (14.0, 18.0)
    """Top and bottom of the door, pixels."""
    margin: float = 1.0
    """Least distance from the edge of the picture, pixels."""
    max_step: float = 1.5
    """Longest step, pixels; longer actions are shortened to it."""

    def step(self, places_B2: Tensor, actions_B2: Tensor) -> Tensor:
        """Moves points by their actions: first across, then up or down; walls stop them.

        Args:
            places_B2: float [B, 2].
            actions_B2: wanted displacements, float [B, 2].

        Returns:
            The new places, [B, 2].
        """
        wanted_B2 = places_B2 + self.shortened(actions_B2)
        low, high = self.margin, SIDE - self.margin
        x_B, y_B = wanted_B2.clamp(low, high).unbind(-1)
        old_x_B, old_y_B = places_B2.unbind(-1)
        (left, right), (top, bottom) = self.wall, self.door
        through_B = (old_y_B >= top) & (old_y_B <= bottom)
        face_B = torch.where(old_x_B <= left, left, right)
        x_B = torch.where(self._inside(x_B) & ~through_B, face_B, x_B)
        y_B = torch.where(self._inside(x_B), y_B.clamp(top, bottom), y_B)
        return torch.stack([x_B, y_B], dim=-1)

    def rollout(self, places_B2: Tensor, actions_BT2: Tensor) -> Tensor:
        """Returns the places after each of T actions, [B, T, 2]."""
        found = []
        for actions_B2 in actions_BT2.unbind(1):
            places_B2 = self.step(places_B2, actions_B2)
            found.append(places_B2)
        return torch.stack(found, dim=1)

    def shortened(self, actions_B2: Tensor) -> Tensor:
        """Returns actions of at most `max_step`, in the same direction, [..., 2]."""
        length_B1 = actions_B2.norm(dim=-1, keepdim=True)
        shortened_B2: Tensor = actions_B2 * (self.max_step / length_B1.clamp(min=self.max_step))
        return shortened_B2

    def render(self, places_B2: Tensor) -> Tensor:
        """Draws the world as RGB: the dot is white, the wall blue.

        Returns:
            uint8 [B, 3, H, W].
        """
        centres_H = torch.arange(SIDE, device=places_B2.device) + 0.5
        x_BH, y_BH = (torch.exp(-((centres_H - p[:, None]) ** 2) / (2 * DOT**2))
                      for p in places_B2.unbind(-1))  # fmt: skip
        dot_BHW = y_BH[:, :, None] * x_BH[:, None, :]
        wall_HW = self._wall(centres_H)
        blue_BHW = torch.maximum(dot_BHW, wall_HW.expand_as(dot_BHW))
        return (255 * torch.stack([dot_BHW, dot_BHW, blue_BHW], dim=1)).round().to(torch.uint8)

    def _wall(self, centres_H: Tensor) -> Tensor:
        top, bottom = self.door
        solid_H = (centres_H < top) | (centres_H > bottom)
        return (solid_H[:, None] & self._inside(centres_H)[None]).float()

    def _inside(self, x_B: Tensor) -> Tensor:
        return (x_B > self.wall[0]) & (x_B < self.wall[1])

    def room(self, places_B2: Tensor) -> Tensor:
        """Returns 0 left of the wall, 1 right of it, and -1 in the door, int64 [B]."""
        x_B = places_B2[..., 0]
        return (x_B >= self.wall[1]).long() - self._inside(x_B).long()

    def sample_places(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws places in the two rooms, evenly, float [B, 2]."""
        draws_B2 = torch.rand(count, 2, generator=generator)
        low, high = self.margin, SIDE - self.margin
        left, right = self.wall
        across_B = low + draws_B2[:, 0] * (high - low - (right - left))
        x_B = torch.where(across_B <= left, across_B, across_B + (right - left))
        return torch.stack([x_B, low + draws_B2[:, 1] * (high - low)], dim=-1)

    def random_walk(
        self, count: int, steps: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draws walks whose heading drifts, from places all over the rooms.

        Args:
            count: B.
            steps: T.
            generator: of everything random.

        Returns:
            Places [B, T + 1, 2] and the actions between them, [B, T, 2].
        """
        places_B2 = self.sample_places(count, generator)
        start_B1 = 2 * math.pi * torch.rand(count, 1, generator=generator)
        turns_BT = TURN * torch.randn(count, steps, generator=generator)
        heading_BT = start_B1 + turns_BT.cumsum(1)
        length_BT = self.max_step * torch.rand(count, steps, generator=generator).sqrt()
        way_BT2 = torch.stack([heading_BT.cos(), heading_BT.sin()], dim=-1)
        actions_BT2 = length_BT[..., None] * way_BT2
        reached_BT2 = self.rollout(places_B2, actions_BT2)
        return torch.cat([places_B2[:, None], reached_BT2], dim=1), actions_BT2

    def way_out(self, places_B2: Tensor, goals_B2: Tensor) -> Tensor:
        """Returns the action of one who knows the map: straight to the goal, or through the door.

        Args:
            places_B2: float [B, 2].
            goals_B2: places in the rooms, float [B, 2].
        """
        (left, right), (top, bottom) = self.wall, self.door
        middle = (top + bottom) / 2
        here_B, there_B = self.room(places_B2), self.room(goals_B2)
        near_B = torch.where(there_B == 1, left, right)
        far_B = torch.where(there_B == 1, right, left)
        at_door_B = (here_B == -1) | ((places_B2[:, 1] - middle).abs() < (bottom - top) / 4)
        door_B = torch.where(at_door_B, far_B, near_B)
        door_B2 = torch.stack([door_B, torch.full_like(door_B, middle)], dim=-1)
        target_B2 = torch.where((here_B == there_B)[:, None], goals_B2, door_B2)
        return self.shortened(target_B2 - places_B2)

    def way_length(self, places_B2: Tensor, goals_B2: Tensor) -> Tensor:
        """Returns the length of the way: straight, or through the middle of the door.

        Args:
            places_B2: float [..., 2].
            goals_B2: float [..., 2], of the same shape or one that broadcasts.
        """
        middle_2 = places_B2.new_tensor([sum(self.wall) / 2, sum(self.door) / 2])
        around_B = (places_B2 - middle_2).norm(dim=-1) + (goals_B2 - middle_2).norm(dim=-1)
        straight_B = (places_B2 - goals_B2).norm(dim=-1)
        return torch.where(self.room(places_B2) == self.room(goals_B2), straight_B, around_B)

    def reached(self, places_B2: Tensor, goals_B2: Tensor) -> Tensor:
        """Returns whether each point is at its goal, bool [B]."""
        near_B: Tensor = (places_B2 - goals_B2).norm(dim=-1) < REACHED
        return near_B


@dataclass(frozen=True, kw_only=True)
class TrueModel:
    """The true simulator as a world model; its observations and latents are the places."""

    world: TwoRooms

    def encode(self, places_B2: Tensor) -> Tensor:
        """Returns the places."""
        return places_B2

    def rollout(self, places_B2: Tensor, actions_BT2: Tensor) -> Tensor:
        """Returns the places after each action, [1, B, T, 2]."""
        return self.world.rollout(places_B2, actions_BT2)[None]
