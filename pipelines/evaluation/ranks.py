"""RankMe and LiDAR: measures of how many directions an encoder's features use.

RankMe (Garrido et al. 2023, arXiv 2210.02885) is the exponential of the entropy of the normalised
singular values of a feature matrix. LiDAR (Thilak et al. 2023, arXiv 2312.04000) is the same for
the eigenvalues of a linear discriminant analysis in which every sample is a class and its augmented
views are the members. Unlike RankMe, it does not count directions in which the views of one sample
differ as much as the samples do.

We depart from the LiDAR paper in one point. The mean of Q views scatters by W/Q itself, which adds
1/Q to every eigenvalue. With the few views that are cheap enough to read often, that drowns the
rest, so we subtract that share.

Shape suffixes: N samples, Q views of each, D feature width.
"""

from __future__ import annotations

import torch
from torch import Tensor

DELTA = 1e-4
"""Added to the diagonal of the scatter within samples."""


def lidar(features_NQD: Tensor, *, delta: float = DELTA) -> float:
    """Exp of the entropy of the normalised positive eigenvalues of V^(-1/2) (B - W/Q) V^(-1/2).

    B is the covariance of the samples' mean features (over N - 1), W the covariance of views about
    their sample's mean (over N (Q - 1)), and V is W plus `delta` on its diagonal; all in fp64. So
    B - W/Q is an unbiased estimate of the covariance of the means of infinitely many views.

    Args:
        features_NQD: [N, Q, D]; the value cannot exceed min(N - 1, D).
        delta: regularises V; should be small beside the variance of a feature.

    Returns:
        Between 1 (at most one direction tells samples apart) and D; NaN for features that are not
        finite. Pure noise does not score low: about half of the directions come out positive.

    Raises:
        ValueError: there are fewer than two samples or views.
    """
    features_NQD = torch.as_tensor(features_NQD).double()
    N, Q, D = features_NQD.shape
    if N < 2 or Q < 2:
        raise ValueError(f"LiDAR needs two samples and two views or more, not {N} and {Q}")
    if not torch.isfinite(features_NQD).all():
        return float("nan")
    means_ND = features_NQD.mean(dim=1)
    within_MD = (features_NQD - means_ND[:, None]).flatten(0, 1)
    between_ND = means_ND - means_ND.mean(dim=0)
    # Below this the means differ only by fp32 rounding, whose rank would look high.
    if between_ND.square().sum() <= 1e-12 * means_ND.square().sum():
        return 1.0
    identity_DD = torch.eye(D, dtype=torch.float64, device=means_ND.device)
    W_DD = within_MD.T @ within_MD / (N * (Q - 1))
    B_DD = between_ND.T @ between_ND / (N - 1) - W_DD / Q
    # With V = L L^T those eigenvalues are the ones of L^-1 (B - W/Q) L^-T.
    L_DD = torch.linalg.cholesky(W_DD + delta * identity_DD)
    half_DD = torch.linalg.solve_triangular(L_DD, B_DD, upper=False)
    whole_DD = torch.linalg.solve_triangular(L_DD, half_DD.T, upper=False)
    return effective_rank(torch.linalg.eigvalsh(whole_DD).clamp(min=0))


RANKME_EPS = 1e-7


def rankme(features_ND: Tensor, *, centred: bool = False) -> float:
    """Computes a feature matrix's effective rank: exp of the entropy of its singular values.

    Args:
        features_ND: [N, D] features; the value cannot exceed min(N, D).
        centred: subtract the mean row first. The paper does not; a large common mean then counts as
            one dominant direction and hides the others.

    Returns:
        Between 1 (a single direction) and D.
    """
    features = torch.as_tensor(features_ND).double()
    if centred:
        features = features - features.mean(dim=0)
    return effective_rank(torch.linalg.svdvals(features))


def effective_rank(values: Tensor) -> float:
    """Returns exp of the entropy of non-negative values scaled to sum to 1 (arXiv 2210.02885)."""
    total = values.sum()
    if not total > 0:  # all zero, which counts as one direction, or NaN
        return float("nan") if torch.isnan(total) else 1.0
    p = values / total + RANKME_EPS
    return float(torch.exp(-(p * torch.log(p)).sum()))
