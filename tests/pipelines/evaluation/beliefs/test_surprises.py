"""Cuts, the baseline of pixels, and the area under the ROC curve.

Shape legend: B clips, C channels, T frames, H and W pixels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.evaluation.beliefs.surprises import auroc, pixel_change, spliced


def test_auroc_is_that_of_counting_pairs() -> None:
    rng = np.random.default_rng(0)
    ordinary, odd = rng.integers(0, 9, 40), rng.integers(2, 11, 30)
    pairs = [(a < b) + 0.5 * (a == b) for a in ordinary for b in odd]
    found = auroc(torch.tensor(ordinary), torch.tensor(odd))
    assert found == pytest.approx(np.mean(pairs))
    assert auroc(torch.tensor(ordinary), torch.tensor(ordinary)) == pytest.approx(0.5)
    assert auroc(torch.zeros(3), torch.ones(3)) == 1.0


def test_a_cut_joins_the_beginning_of_one_clip_and_the_end_of_another() -> None:
    clips = torch.arange(3, dtype=torch.uint8)[:, None, None, None, None].expand(3, 3, 4, 2, 2)
    found = spliced(clips)[:, 0, :, 0, 0]
    assert found.tolist() == [[0, 0, 2, 2], [1, 1, 0, 0], [2, 2, 1, 1]]
    assert pixel_change(clips).tolist() == [0, 0, 0]
    assert pixel_change(spliced(clips)).tolist() == [2, 1, 1]
