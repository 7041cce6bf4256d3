"""Ridge regression in closed form, with the penalty of least leave-one-out error.

The hat matrix H tells that error without refitting: the residual of a row that is left out is
(y - Hy) / (1 - diag H) (Allen 1974).

Shape suffixes: N rows to learn from, Q rows to be scored on, D feature width, C outputs, R rank of
the features.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

PENALTIES = torch.logspace(-5, 1, 13, dtype=torch.double)
"""Penalties that are tried, relative to the largest squared singular value of the features."""


@dataclasses.dataclass(frozen=True)
class Ridge:
    """A fitted ridge regression: y = x @ weight + offset, in fp64."""

    weight_DC: Tensor
    offset_C: Tensor
    penalty: float
    left_out_error: float
    """Mean squared leave-one-out error of the training rows."""

    def predict(self, x_QD: Tensor) -> Tensor:
        """Returns the outputs [Q, C] of features that were centred as those of the training."""
        return x_QD.to(self.weight_DC) @ self.weight_DC + self.offset_C


def fit_ridge(x_ND: Tensor, y_NC: Tensor) -> Ridge:
    """Fits a ridge regression whose intercept is not penalised.

    Args:
        x_ND: features, each of mean 0 over the rows.
        y_NC: what to predict; one penalty is chosen for all outputs together.
    """
    y_NC = y_NC.to(x_ND.device).double()
    mean_C = y_NC.mean(dim=0)
    u_NR, s_R, v_DR = _svd(x_ND.double())
    read_RC = u_NR.T @ (y_NC - mean_C)
    best: tuple[float, Tensor] | None = None
    for penalty in s_R.max() ** 2 * PENALTIES.to(s_R.device):
        shrink_R = s_R**2 / (s_R**2 + penalty)
        fitted_NC = (u_NR * shrink_R) @ read_RC + mean_C
        leverage_N = (u_NR**2 * shrink_R).sum(dim=1) + 1 / len(x_ND)
        error = (((y_NC - fitted_NC) / (1 - leverage_N).clamp_min(1e-6)[:, None]) ** 2).mean()
        if best is None or float(error) < best[0]:
            best = (float(error), penalty)
    assert best is not None
    weight_DC = (v_DR * (s_R / (s_R**2 + best[1]))) @ read_RC
    return Ridge(weight_DC, mean_C, penalty=float(best[1]), left_out_error=best[0])


def _svd(x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decomposes features into u [N, R], s [R] and v [D, R], of rank R at least 1.

    They come from the smaller of the two Gram matrices, which is much faster than a decomposition
    of the features themselves where they have many more dimensions than rows, or the reverse.
    Directions below 1e-6 of the largest are rounding errors there, and left out.
    """
    wide = x_ND.shape[1] > x_ND.shape[0]
    squares, vectors = torch.linalg.eigh(x_ND @ x_ND.T if wide else x_ND.T @ x_ND)
    kept = squares > 1e-12 * squares[-1]
    if not kept.any():  # features that never vary
        return (x_ND.new_zeros(len(x_ND), 1), x_ND.new_ones(1), x_ND.new_zeros(x_ND.shape[1], 1))
    s_R, vectors = squares[kept].sqrt(), vectors[:, kept]
    if wide:
        return vectors, s_R, x_ND.T @ vectors / s_R
    return x_ND @ vectors / s_R, s_R, vectors
