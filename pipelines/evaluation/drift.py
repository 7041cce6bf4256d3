"""How far features have moved, and the way back, without labels.

Shape suffixes: N samples, M other samples, D feature width.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from models.artifacts.alignment import Alignment
from pipelines.evaluation.arrays import Array, as_features

RIDGE = 1e-2
"""Strength of the paired alignment's penalty, relative to the mean variance of a feature."""
SHRINKAGE = 0.1
"""What is added to the covariances of an unpaired alignment, relative to the mean variance."""


def paired_alignment(new: Array, old: Array) -> Alignment:
    """Fits the affine map that brings an encoder's features closest to another's on some samples.

    Ridge regression, in closed form.

    Args:
        new: [N, D] features to map.
        old: [N, D] features of the same samples, to come close to.
    """
    new_ND, old_ND = _as_float64(new), _as_float64(old)
    new_D, old_D = new_ND.mean(axis=0), old_ND.mean(axis=0)
    x_ND, y_ND = new_ND - new_D, old_ND - old_D
    own_DD = x_ND.T @ x_ND
    penalty = RIDGE * np.trace(own_DD) / len(own_DD)
    weight_DD = np.linalg.solve(own_DD + penalty * np.eye(len(own_DD)), x_ND.T @ y_ND)
    return _alignment(weight_DD, old_D - new_D @ weight_DD)


def unpaired_alignment(
    new: Array, old: Array, how: Literal["mean", "covariance"] = "mean"
) -> Alignment:
    """Fits the affine map that gives features of new footage the statistics of old footage.

    `mean` makes the means equal (AdaBN, Li et al. 2016, arXiv 1603.04779, with one layer).
    `covariance` also whitens by the covariance of the new features and colours by that of the old
    ones (CORAL, Sun et al. 2016, arXiv 1612.01939, applied to the new side, so that probes of the
    old features stay as they are). The covariances are shrunk towards a multiple of the identity.

    Args:
        new: [M, D] features of new footage.
        old: [N, D] features of old footage by the same encoder.
        how: what becomes equal.
    """
    new_MD, old_ND = _as_float64(new), _as_float64(old)
    weight_DD = np.eye(new_MD.shape[1])
    if how == "covariance":
        weight_DD = _power(shrunk_covariance(new_MD), -0.5) @ _power(shrunk_covariance(old_ND), 0.5)
    return _alignment(weight_DD, old_ND.mean(axis=0) - new_MD.mean(axis=0) @ weight_DD)


def shrunk_covariance(x_ND: np.ndarray) -> np.ndarray:
    """Returns the covariance [D, D], its diagonal raised by `SHRINKAGE` of the mean variance.

    Raises:
        ValueError: the features do not vary.
    """
    covariance_DD = np.atleast_2d(np.cov(x_ND, rowvar=False))
    if not np.trace(covariance_DD) > 0:
        raise ValueError("the features of some footage are all equal, so they have no covariance")
    ridge = SHRINKAGE * np.trace(covariance_DD) / len(covariance_DD)
    return np.asarray(covariance_DD + ridge * np.eye(len(covariance_DD)))


def _power(symmetric_DD: np.ndarray, exponent: float) -> np.ndarray:
    values_D, vectors_DD = np.linalg.eigh(symmetric_DD)
    return np.asarray((vectors_DD * values_D**exponent) @ vectors_DD.T)


def _alignment(weight_DD: np.ndarray, bias_D: np.ndarray) -> Alignment:
    return Alignment(weight_DD.astype(np.float32), bias_D.astype(np.float32))


def _as_float64(features: Array) -> np.ndarray:
    return np.asarray(as_features(features).double().cpu().numpy())


def statistics_drift(new: Array, old: Array) -> dict[str, float]:
    """Compares the statistics of two kinds of footage by one encoder.

    Args:
        new: [M, D] features of new footage.
        old: [N, D] features of old footage.

    Returns:
        `mean`: distance of the means, relative to the root of the mean squared distance of an old
        feature from its mean. `covariance`: Frobenius norm of the covariances' difference, relative
        to that of the old one. Both are 0 if nothing moved.
    """
    new_MD, old_ND = _as_float64(new), _as_float64(old)
    old_D = old_ND.mean(axis=0)
    spread = np.sqrt(((old_ND - old_D) ** 2).sum(axis=1).mean())
    new_DD, old_DD = (np.cov(x, rowvar=False) for x in (new_MD, old_ND))
    return {
        "mean": float(np.linalg.norm(new_MD.mean(axis=0) - old_D) / max(spread, 1e-12)),
        "covariance": float(
            np.linalg.norm(new_DD - old_DD) / max(float(np.linalg.norm(old_DD)), 1e-12)
        ),
    }


def feature_drift(old: Array, new: Array) -> dict[str, float]:
    """Compares the features of the same samples by two encoders of one width.

    Args:
        old: [N, D] features by the old encoder.
        new: [N, D] features by the new one.

    Returns:
        `cosine`: mean cosine similarity of a sample's two features, both relative to the old
        features' mean; 1 if nothing moved. `cka`: linear centred kernel alignment (Kornblith et al.
        2019, arXiv 1905.00414, equation 4), which ignores rotations; 1 if the features only turned.
    """
    old_ND, new_ND = _as_float64(old), _as_float64(new)
    centre_D = old_ND.mean(axis=0)
    a_ND, b_ND = old_ND - centre_D, new_ND - centre_D
    norms_N = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
    cosine = ((a_ND * b_ND).sum(axis=1) / np.maximum(norms_N, 1e-12)).mean()
    b_ND = new_ND - new_ND.mean(axis=0)
    own = float(np.linalg.norm(a_ND.T @ a_ND) * np.linalg.norm(b_ND.T @ b_ND))
    shared = float(np.linalg.norm(b_ND.T @ a_ND) ** 2)
    return {"cosine": float(cosine), "cka": shared / max(own, 1e-12)}
