"""The way back from a shift of the features: its closed forms, and what it does for a probe."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.artifacts.alignment import Alignment
from pipelines.evaluation.drift import (
    SHRINKAGE,
    paired_alignment,
    statistics_drift,
    unpaired_alignment,
)
from pipelines.evaluation.ridge import fit_ridge

WIDTH = 8


def footage(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of two classes, which differ along one correlated direction, and the classes."""
    rng = np.random.default_rng(seed)
    mixed_DD = np.random.default_rng(99).normal(size=(WIDTH, WIDTH)) + 2 * np.eye(WIDTH)
    classes_N = np.arange(count) % 2
    raw_ND = rng.normal(size=(count, WIDTH))
    raw_ND[:, 0] += 4 * classes_N
    return (raw_ND @ mixed_DD + 3).astype(np.float32), classes_N


def shift(features_ND: np.ndarray, how: str) -> np.ndarray:
    """What a new HUD does: it adds the same to everything, and may also stretch."""
    rng = np.random.default_rng(7)
    bias_D, scales_D = rng.normal(0, 10, WIDTH), rng.uniform(0.2, 5, WIDTH)
    moved = features_ND * scales_D if how == "covariance" else features_ND
    return (moved + bias_D).astype(np.float32)


def accuracy(alignment: Alignment | None, how: str) -> float:
    """Accuracy of a probe of old footage on shifted footage."""
    train_ND, train_N = footage(400, 0)
    test_ND, test_N = footage(200, 1)
    centre_D = torch.from_numpy(train_ND).double().mean(0)
    ridge = fit_ridge(
        torch.from_numpy(train_ND).double() - centre_D,
        torch.nn.functional.one_hot(torch.from_numpy(train_N)).double(),
    )
    moved_ND = shift(test_ND, how)
    read_ND = moved_ND if alignment is None else alignment(moved_ND)
    read_NC = ridge.predict(torch.from_numpy(read_ND).double() - centre_D)
    return float((read_NC.argmax(1).numpy() == test_N).mean())


@pytest.mark.parametrize("how", ["mean", "covariance"])
def test_means_and_shrunk_covariances_become_those_of_old_footage(how: str) -> None:
    old_ND, new_MD = footage(300, 2)[0], shift(footage(500, 3)[0], "covariance")
    alignment = unpaired_alignment(new_MD, old_ND, how)
    mapped_MD = alignment(new_MD)
    np.testing.assert_allclose(
        mapped_MD.mean(0, dtype=np.float64), old_ND.mean(0, dtype=np.float64), atol=1e-6, rtol=1e-6
    )
    weight_DD = alignment.weight_DD.astype(np.float64)
    mapped_DD = weight_DD.T @ _shrunk(new_MD) @ weight_DD
    difference = np.abs(mapped_DD - _shrunk(old_ND)).max()
    assert (difference < 1e-4) == (how == "covariance")
    if how == "mean":
        np.testing.assert_array_equal(weight_DD, np.eye(WIDTH))


def _shrunk(x_ND: np.ndarray) -> np.ndarray:
    """The covariance with a tenth of the mean variance on its diagonal, from the definition."""
    centred_ND = x_ND.astype(np.float64) - x_ND.astype(np.float64).mean(0)
    covariance_DD = centred_ND.T @ centred_ND / (len(x_ND) - 1)
    return covariance_DD + SHRINKAGE * covariance_DD.diagonal().mean() * np.eye(WIDTH)


@pytest.mark.parametrize("how", ["mean", "covariance"])
def test_an_old_probe_reads_aligned_features_and_unrelated_footage_does_not_help(how: str) -> None:
    old_ND, new_MD = footage(400, 4)[0], shift(footage(400, 5)[0], how)
    unrelated_MD = np.random.default_rng(6).normal(-20, 3, (400, WIDTH)).astype(np.float32)
    assert accuracy(None, how) < 0.7
    assert accuracy(unpaired_alignment(new_MD, old_ND, how), how) > 0.95
    assert accuracy(unpaired_alignment(unrelated_MD, old_ND, how), how) < 0.7


def test_a_map_of_pairs_and_one_of_statistics_agree_where_only_the_mean_moved() -> None:
    old_ND, _ = footage(400, 8)
    new_ND = old_ND + np.float32(2)
    paired, unpaired = paired_alignment(new_ND, old_ND), unpaired_alignment(new_ND, old_ND)
    np.testing.assert_allclose(paired(new_ND).mean(0), unpaired(new_ND).mean(0), atol=1e-4)


def test_the_drift_of_statistics_tells_a_moved_mean_from_a_stretch() -> None:
    old_ND, _ = footage(2000, 9)
    assert statistics_drift(old_ND, old_ND) == pytest.approx({"mean": 0, "covariance": 0})
    spread = np.sqrt(old_ND.var(axis=0).sum())
    moved_ND = old_ND.copy()
    moved_ND[:, 2] += 3 * spread
    assert statistics_drift(moved_ND, old_ND) == pytest.approx(
        {"mean": 3, "covariance": 0}, abs=1e-3
    )
    stretched_ND = 2 * (old_ND - old_ND.mean(0)) + old_ND.mean(0)
    assert statistics_drift(stretched_ND, old_ND) == pytest.approx(
        {"mean": 0, "covariance": 3}, abs=1e-3
    )


def test_features_that_do_not_vary_have_no_covariance_to_align() -> None:
    old_ND, _ = footage(50, 10)
    equal_ND = np.ones_like(old_ND)
    mapped_ND = unpaired_alignment(equal_ND, old_ND)(equal_ND)
    np.testing.assert_allclose(mapped_ND[0], old_ND.mean(0), rtol=1e-5)
    with pytest.raises(ValueError, match="all equal, so they have no covariance"):
        unpaired_alignment(equal_ND, old_ND, "covariance")
