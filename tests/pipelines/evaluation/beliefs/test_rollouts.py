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

    history, frame_width = 1, 2  # type: ignore[assignment]

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.world = TwoRooms()

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        red_BHW = (frames_BCHW[:, 0].float() / 255).square()
        share_BHW = red_BHW / red_BHW.sum((1, 2), keepdim=True).clamp(min=1e-6)
        at = torch.arange(32) + 0.5
        return torch.stack([share_BHW.sum(1) @ at, share_BHW.sum(2) @ at], -1) / 16 - 1

    def rollout(self, latents_BD: Tensor, actions_BTA: Tensor) -> Tensor:
        return (self.world.rollout((latents_BD + 1) * 16, actions_BTA) / 16 - 1)[None]


class Remembering(Perfect):
    """The same with a state of two frames, the newest last; it knows nothing of the older one."""

    history = 2  # type: ignore[assignment]

    def encode(self, frames_BCHW: Tensor) -> Tensor:
        newest_BD = super().encode(frames_BCHW[:, -3:])
        return torch.cat([torch.full_like(newest_BD, torch.nan), newest_BD], dim=-1)

    def rollout(self, states_BZ: Tensor, actions_BTA: Tensor) -> Tensor:
        newest_EBTD = super().rollout(states_BZ[:, 2:], actions_BTA)
        return torch.cat([torch.full_like(newest_EBTD, torch.nan), newest_EBTD], dim=-1)


def walked(steps: int) -> tuple[Tensor, Tensor]:
    world = TwoRooms()
    places, actions = world.random_walk(WALKS, steps, torch.Generator().manual_seed(0))
    return torch.stack([world.render(one) for one in places]).transpose(1, 2), actions


@pytest.fixture(scope="module")
def found() -> Rollouts:
    clips, actions = walked(STEPS)
    return rollout_study(Perfect(), clips, clips, actions, steps=250, seed=0)


def test_imagination_starts_from_as_many_frames_as_a_state_has() -> None:
    clips, actions = walked(4)
    later = rollout_study(Perfect(), clips, clips[:, :, 1:], actions[:, 1:], steps=3, seed=0)
    found = rollout_study(Remembering(), clips, clips, actions, steps=3, seed=0)
    assert found.results == later.results
    for panel, same in zip(found.panels, later.panels, strict=True):
        assert torch.equal(panel.pixels, same.pixels)


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
