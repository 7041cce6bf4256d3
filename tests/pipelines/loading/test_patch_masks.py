"""Masks of single patches: random ones (MAE) and disjoint ones (DMJD).

Shape legend: B samples, N tokens, C contexts, K context tokens, T target tokens.
"""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from models.keyed_random.arrays import sample_keys
from pipelines.config.data import MaskConfig
from pipelines.config.objectives import ObjectiveConfig
from pipelines.config.train import ModelConfig, PretrainConfig
from pipelines.loading.loader import _ids
from pipelines.loading.masks.maskers import make_masker
from pipelines.loading.masks.patches import disjoint_masks, random_masks


def keys(count: int = 500, epoch: int = 0) -> np.ndarray:
    return sample_keys([n.to_bytes(16, "big") for n in range(count)], 0, epoch)


def config(name: str, **mask: object) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(encoder="vit_micro32", image_size=32, patch_size=8),
        objective=ObjectiveConfig(name=name),
        mask=MaskConfig(**mask),  # type: ignore[arg-type]
    )


def test_random_masks_divide_the_image() -> None:
    context_BK, target_BT = random_masks(keys(), 16, 4)
    assert (np.sort(np.concatenate([context_BK, target_BT], 1), 1) == np.arange(16)).all()
    assert (np.diff(context_BK) > 0).all()
    assert (np.diff(target_BT) > 0).all()
    share = np.bincount(context_BK.ravel(), minlength=16) / 500
    assert np.abs(share - 0.25).max() < 0.08


@pytest.mark.parametrize(("count", "contexts", "keep"), [(16, 4, 6), (16, 2, None), (49, 3, 10)])
def test_disjoint_targets_cover_the_image_and_no_context_sees_its_own(
    count: int, contexts: int, keep: int | None
) -> None:
    context_BCK, target_BCT = disjoint_masks(keys(), count, contexts, keep)
    T = count // contexts
    assert target_BCT.shape == (500, contexts, T)
    assert context_BCK.shape == (500, contexts, keep or count - T)
    for context_CK, target_CT in zip(context_BCK, target_BCT, strict=True):
        assert len(np.unique(target_CT)) == contexts * T  # disjoint
        for context_K, target_T in zip(context_CK, target_CT, strict=True):
            assert len(np.unique(context_K)) == len(context_K)
            assert not set(context_K) & set(target_T)
    for ids, size in ((target_BCT, T), (context_BCK, context_BCK.shape[2])):
        assert (np.diff(ids) > 0).all()
        assert (
            np.abs(np.bincount(ids.ravel(), minlength=count) / 500 / contexts - size / count).max()
            < 0.05
        )


def test_masks_follow_from_the_sample_and_the_epoch() -> None:
    whole, some = disjoint_masks(keys(), 16, 4, 6), disjoint_masks(keys()[[7, 3]], 16, 4, 6)
    for a, b in zip(whole, some, strict=True):
        assert (a[[7, 3]] == b).all()
    assert (random_masks(keys(), 16, 4)[0] != random_masks(keys(epoch=1), 16, 4)[0]).any()


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mae", {"context_ids": (3, 4), "target_ids": (3, 1, 12)}),
        ("dmjd", {"context_ids": (3, 4, 12), "target_ids": (3, 4, 4)}),
        ("lejepa", {}),
        ("vicreg", {}),
    ],
)
def test_every_objective_gets_its_masks_in_its_shape(name: str, shapes: dict) -> None:
    masker = make_masker(config(name))
    masker.check()
    masks = masker.for_samples(keys(3))
    assert {n: ids.shape for n, ids in masks.items()} == shapes
    for n, ids in masks.items():  # through the loader's flat column
        column = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), ids[0].size)
        restored = _ids(pa.table({n: column}), n, masker)
        assert torch.equal(restored, torch.from_numpy(ids).long())


@pytest.mark.parametrize(
    ("name", "mask", "flag"),
    [
        ("mae", {"hidden": 0.99}, "mask.hidden"),
        ("dmjd", {"contexts": 17}, "mask.contexts"),
        ("dmjd", {"context_keep": 13}, "mask.context-keep"),
    ],
)
def test_impossible_mask_settings_name_the_flag(name: str, mask: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=f"--{flag}"):
        make_masker(config(name, **mask)).check()


def test_every_objective_has_masks_and_the_trainers_settings() -> None:
    from models.objectives.registry import objectives
    from pipelines.config.objectives import REGISTERED

    assert REGISTERED.keys() == objectives().keys()
    cfg = PretrainConfig()
    assert cfg.objective_settings["views"] == dataclasses.asdict(cfg.views)
