"""Whether a picture is recognisably that of its source: retrieval among others.

Shape legend: N samples, Q of which are looked for, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def ranks(queries_QD: Tensor, candidates_ND: Tensor) -> Tensor:
    """Returns the rank, from 1, of candidate i by its cosine to query i, among all, float [Q].

    Of equal candidates the mean rank is taken, so that nothing is gained from their order.

    Args:
        queries_QD: the first Q samples as they were drawn.
        candidates_ND: all samples as they are.
    """
    similar_QN = (
        functional.normalize(queries_QD, dim=-1) @ functional.normalize(candidates_ND, dim=-1).mT
    )
    own_Q1 = similar_QN.diagonal()[:, None]
    better_Q = (similar_QN > own_Q1).sum(1)
    equal_Q = (similar_QN == own_Q1).sum(1)  # itself among them
    return better_Q + (equal_Q + 1) / 2


def mean_reciprocal_rank(queries_QD: Tensor, candidates_ND: Tensor) -> float:
    """Returns the mean of 1 / rank, 1 if every source is found first; see `ranks`."""
    return float((1 / ranks(queries_QD, candidates_ND)).mean())


def chance(count: int) -> float:
    """Returns the mean reciprocal rank of guessing among so many: H(N) / N."""
    return float((1 / torch.arange(1, count + 1, dtype=torch.float64)).sum() / count)
