"""The fixed masks hide every token, are of the run's own kind, and show nothing that they hide."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pipelines.config.train import PretrainConfig
from pipelines.evaluation.beliefs.masks import MOST, choose_masks, future_masks
from pipelines.loading.masks.maskers import make_masker
from pipelines.recipes.registry import RECIPES


def recipe(name: str) -> PretrainConfig:
    return RECIPES[name][1]


@pytest.mark.parametrize(
    "name", ["cifar10_demo", "dmjd_cifar10_demo", "vjepa_movingmnist", "vjepa_occlusion"]
)
def test_masks_hide_every_token_and_show_none_that_they_hide(name: str) -> None:
    cfg = recipe(name)
    masks = choose_masks(cfg)
    hidden = torch.cat([mask.hidden_T for mask in masks])
    assert set(hidden.tolist()) == set(range(cfg.model.grid.tokens))
    for mask in masks:
        assert not set(mask.context_K.tolist()) & set(mask.hidden_T.tolist())
    assert len(masks) <= MOST
    drawn = make_masker(cfg).for_samples(torch.arange(1).numpy().astype("uint64"))
    lengths = {values.shape[-1] for key, values in drawn.items() if key.startswith("target")}
    assert {len(mask.hidden_T) for mask in masks} <= lengths
    generators = sum(key.startswith("context") for key in drawn)
    assert {mask.generator for mask in masks} <= set(range(generators))


def test_masks_do_not_depend_on_the_seed_and_legacy_runs_have_some() -> None:
    cfg = recipe("cifar10_demo")
    other = dataclasses.replace(
        cfg,
        run=dataclasses.replace(cfg.run, seed=5),
        mask=dataclasses.replace(cfg.mask, truncate="legacy"),
    )
    for one, two in zip(choose_masks(cfg), choose_masks(other), strict=True):
        assert torch.equal(one.context_K, two.context_K)
        assert torch.equal(one.hidden_T, two.hidden_T)


def test_the_future_is_hidden_behind_all_of_the_past() -> None:
    cfg = recipe("vjepa_occlusion")  # four steps of 16 tokens
    masks = future_masks(cfg)
    assert [mask.hidden_T.tolist() for mask in masks] == [
        list(range(first, first + 16)) for first in (0, 16, 32, 48)
    ]
    assert masks[0].context_K.tolist() == list(range(16, 32))
    assert [len(mask.context_K) for mask in masks[1:]] == [16, 32, 48]
    assert all(int(mask.context_K.max()) < int(mask.hidden_T.min()) for mask in masks[1:])
