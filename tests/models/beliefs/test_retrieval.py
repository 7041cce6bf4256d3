"""Mean reciprocal ranks, against a loop, with controls at chance.

Shape legend: N samples, D width.
"""

from __future__ import annotations

import pytest
import torch

from models.beliefs.retrieval import chance, mean_reciprocal_rank, ranks


def features(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def test_ranks_are_those_of_a_loop() -> None:
    real_ND = features(40)
    drawn_ND = real_ND + 0.8 * features(40, 1)
    found = []
    for i, drawn_D in enumerate(drawn_ND[:25]):
        alike = [float(torch.cosine_similarity(drawn_D, real_D, dim=0)) for real_D in real_ND]
        found.append(1.0 + sum(one > alike[i] for one in alike))
    assert ranks(drawn_ND[:25], real_ND).tolist() == found
    assert max(found) > 1


def test_the_source_is_found_and_another_is_not() -> None:
    real_ND = features(1000)
    assert mean_reciprocal_rank(real_ND + 0.01 * features(1000, 1), real_ND) == 1.0
    shuffled = mean_reciprocal_rank(real_ND.roll(1, 0), real_ND)
    assert shuffled == pytest.approx(chance(1000), abs=0.006)
    assert chance(1000) == pytest.approx(0.0075, abs=1e-4)


def test_a_constant_picture_gains_nothing_from_the_order() -> None:
    real_ND = features(300)
    same_ND = features(1, 5).expand(300, -1)
    assert mean_reciprocal_rank(same_ND, real_ND) == pytest.approx(chance(300), rel=1e-4)
    alike_ND = torch.ones(300, 16)
    assert ranks(same_ND, alike_ND).tolist() == [150.5] * 300
