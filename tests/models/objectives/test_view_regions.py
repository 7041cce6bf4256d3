"""Regions that are left out of random views.

Shape legend: B images, R regions, 4 = (left, top, right, bottom).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models.objectives.joint_embedding import JointEmbedding
from models.objectives.registry import build_objective
from models.objectives.view_regions import pick_tokens, shows_none
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.config.views import ViewsConfig

PLAIN = {"colour": 0.0, "grey": 0.0}


def objective_of(name: str = "vicreg", **views: object) -> JointEmbedding:
    cfg = PretrainConfig(
        model=ModelConfig(encoder="vit_micro32", image_size=(32, 64), patch_size=8, patch_std=0.14),
        objective=ObjectiveConfig(name=name, projector=(16, 16)),
        views=ViewsConfig(**PLAIN | views),
    )
    torch.manual_seed(0)
    built = build_objective(name, model=cfg.model_settings, objective=cfg.objective_settings)
    assert isinstance(built, JointEmbedding)
    return built.eval()


def test_tokens_that_touch_a_region_are_found() -> None:
    """Against a count of covered points of each token."""
    regions = torch.tensor([[[0.1, 0.0, 0.26, 0.5], [0.9, 0.9, 1.5, 2.0]], [[-1, -1, 0, 2]] * 2])
    free = shows_none(regions.float(), 4, 8)
    for b in range(2):
        for token in range(32):
            row, column = divmod(token, 8)
            xs = (column + (torch.arange(64) + 0.5) / 64) / 8
            ys = (row + (torch.arange(64) + 0.5) / 64) / 4
            inside = [
                bool(((xs > left) & (xs < right)).any() and ((ys > top) & (ys < bottom)).any())
                for left, top, right, bottom in regions[b].tolist()
            ]
            assert bool(free[b, token]) is not any(inside)


def test_tokens_are_picked_in_order_and_padded() -> None:
    order = torch.tensor([[5, 1, 3, 2, 4], [1, 2, 3, 4, 5]])
    allowed = torch.tensor([[True, True, False, True, True], [False, False, True, False, False]])
    ids, valid = pick_tokens(order, allowed, 3)
    assert ids[0].tolist() == [1, 3, 4]
    assert valid.tolist() == [[True] * 3, [True, False, False]]
    assert int(ids[1, 0]) == 2


@pytest.mark.parametrize("token_drop", [0.0, 0.5])
@pytest.mark.parametrize("flip", [0.0, 1.0, 0.5])
def test_what_a_region_shows_changes_no_view(token_drop: float, flip: float) -> None:
    objective = objective_of(flip=flip, token_drop=token_drop, locals=2, local_size=16)
    torch.manual_seed(1)
    pictures = torch.randint(256, (6, 3, 32, 64), dtype=torch.uint8)
    keys, regions = torch.arange(6), torch.tensor([[[0.0, 0.0, 1.0, 0.3]]]).expand(6, -1, -1)
    before = objective.embed(pictures, keys, regions)
    inside, outside = pictures.clone(), pictures.clone()
    # Half a pixel at the region's edge is mixed with its neighbour as the view is resampled.
    inside[:, :, :8] = torch.randint(256, (6, 3, 8, 64), dtype=torch.uint8)
    torch.testing.assert_close(objective.embed(inside, keys, regions), before, atol=2e-5, rtol=0)
    outside[:, :, 20:] = 255 - outside[:, :, 20:]
    assert (objective.embed(outside, keys, regions) - before).abs().amax((0, 2)).min() > 1e-2
    assert (objective.embed(inside, keys) - objective.embed(pictures, keys)).abs().max() > 1e-2


def test_no_region_is_the_same_as_none_given() -> None:
    objective = objective_of()
    pictures = torch.randint(256, (4, 3, 32, 64), dtype=torch.uint8)
    keys = torch.arange(4)
    elsewhere = torch.tensor([[[2.0, 2.0, 3.0, 3.0]]]).expand(4, -1, -1)
    torch.testing.assert_close(
        objective.embed(pictures, keys, elsewhere),
        objective.embed(pictures, keys),
        atol=1e-5,
        rtol=0,
    )


def test_a_rectangular_model_has_rectangular_views() -> None:
    objective = objective_of()
    assert objective.views.global_size == (32, 64)
    (view, _) = objective.views.make(torch.zeros(2, 3, 32, 64, dtype=torch.uint8), torch.arange(2))
    assert view.shape == (2, 3, 32, 64)
    small = dataclasses.replace(objective.views, local_size=(16, 24), locals=1)
    assert small.make(torch.zeros(2, 3, 32, 64, dtype=torch.uint8), torch.arange(2))[2].shape == (
        *(2, 3),
        *(16, 24),
    )
