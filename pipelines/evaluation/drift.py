"""How far an encoder's features have moved from another's, measured without labels.

Shape suffixes: N samples, D feature width.
"""

from __future__ import annotations

import numpy as np

from pipelines.evaluation.arrays import Array, as_features


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
