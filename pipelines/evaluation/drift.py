"""How far an encoder's features have moved from another's, and the way back, without labels.

Shape suffixes: N samples, D feature width.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pipelines.evaluation.arrays import Array, as_features

RIDGE = 1e-2
"""Strength of the alignment's penalty, relative to the mean variance of a feature."""


@dataclasses.dataclass(frozen=True)
class Alignment:
    """The affine map that brings an encoder's features closest to another's on some samples.

    The mean over tokens and an affine map commute, so it applies to tokens and to pooled features.
    """

    weight_DD: np.ndarray
    bias_D: np.ndarray

    @staticmethod
    def fit(new: Array, old: Array) -> Alignment:
        """Fits the map by ridge regression, in closed form.

        Args:
            new: [N, D] features to map.
            old: [N, D] features of the same samples, to come close to.
        """
        new_ND, old_ND = (as_features(x).double().cpu().numpy() for x in (new, old))
        new_D, old_D = new_ND.mean(axis=0), old_ND.mean(axis=0)
        x_ND, y_ND = new_ND - new_D, old_ND - old_D
        own_DD = x_ND.T @ x_ND
        penalty = RIDGE * np.trace(own_DD) / len(own_DD)
        weight_DD = np.linalg.solve(own_DD + penalty * np.eye(len(own_DD)), x_ND.T @ y_ND)
        bias_D = old_D - new_D @ weight_DD
        return Alignment(weight_DD.astype(np.float32), bias_D.astype(np.float32))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Maps features or tokens [..., D]; the dtype stays."""
        mapped: np.ndarray = features.astype(np.float32) @ self.weight_DD + self.bias_D
        return mapped.astype(features.dtype)


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
    old_ND, new_ND = (as_features(x).double().cpu().numpy() for x in (old, new))
    centre_D = old_ND.mean(axis=0)
    a_ND, b_ND = old_ND - centre_D, new_ND - centre_D
    norms_N = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
    cosine = ((a_ND * b_ND).sum(axis=1) / np.maximum(norms_N, 1e-12)).mean()
    b_ND = new_ND - new_ND.mean(axis=0)
    own = float(np.linalg.norm(a_ND.T @ a_ND) * np.linalg.norm(b_ND.T @ b_ND))
    shared = float(np.linalg.norm(b_ND.T @ a_ND) ** 2)
    return {"cosine": float(cosine), "cka": shared / max(own, 1e-12)}
