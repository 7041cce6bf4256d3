"""A world model's imagination is found among real frames, and other actions' is not.

Shape legend: B clips, C channels, T frames, H and W pixels, A action width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.planning.world_model.world_model import WorldModel
from models.planning.worlds.two_rooms import TwoRooms
from pipelines.evaluation.beliefs.rollouts import Rollouts, rollout_study
from pipelines.evaluation.report.rollouts import rollout_lines, rollout_section

WALKS, STEPS = 60, 6


class Perfect(WorldModel):
    """Knows the world: a latent is the place of the dot, read off its pixels."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.perception = nn.Identity()
        self.perception.width = 2  # type: ignore[assignment]
        self.world = TwoRooms()

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        red_BHW = (frames_BCHW[:, 0].float() / 255).square()
        share_BHW = red_BHW / red_BHW.sum((1, 2), keepdim=True).clamp(min=1e-6)
        at = torch.arange(32) + 0.5
        return torch.stack([share_BHW.sum(1) @ at, share_BHW.sum(2) @ at], -1) / 16 - 1

    def rollout(self, latents_BD: Tensor, actions_BTA: Tensor) -> Tensor:
        return (self.world.rollout((latents_BD + 1) * 16, actions_BTA) / 16 - 1)[None]


@pytest.fixture(scope="module")
def found() -> Rollouts:
    world = TwoRooms()
    places, actions = world.random_walk(WALKS, STEPS, torch.Generator().manual_seed(0))
    clips = torch.stack([world.render(one) for one in places]).transpose(1, 2)
    return rollout_study(Perfect(), clips, clips, actions, steps=250, seed=0)


def test_what_is_imagined_is_found_and_other_actions_lead_elsewhere(found: Rollouts) -> None:
    mrr, chance = found.results["mrr"], found.results["chance"]
    assert list(mrr["imagined"]) == ["1", "2", "5", "6"]
    last = str(STEPS)
    assert mrr["imagined"][last] > 0.7 * mrr["real"][last] > 4 * chance
    assert mrr["shuffled"][last] < 0.6 * mrr["imagined"][last]


def test_the_page_shows_every_step_of_a_few_clips(found: Rollouts) -> None:
    section = rollout_section(found)
    assert len(section["clips"]) == 4
    for clip in section["clips"]:
        titles = [title for title, _ in clip]
        assert titles == ["what happened", "real latents", "imagined", "other actions"]
        assert {len(frames) for _, frames in clip} == {STEPS}
    assert len(rollout_lines(found.results)) == 2 + len(section["table"])
