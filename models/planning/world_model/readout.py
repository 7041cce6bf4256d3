"""A linear map from latents to places, for zones to stay out of, pictures and errors in pixels.

Shape suffixes: N frames, D latent width, 2 = (x, y) in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3
"""Weight of the readout's ridge, times the number of frames."""


@dataclass(frozen=True, kw_only=True)
class Readout:
    """The map, fitted by ridge regression."""

    weight_D2: Tensor
    """The last row is the constant."""

    @classmethod
    def fit(cls, latents_ND: Tensor, places_N2: Tensor) -> Readout:
        """Fits the map."""
        rows_ND = _with_one(latents_ND).double()
        unit_DD = torch.eye(rows_ND.shape[1], dtype=torch.float64)
        gram_DD = rows_ND.T @ rows_ND + RIDGE * len(rows_ND) * unit_DD
        solved_D2 = torch.linalg.solve(gram_DD, rows_ND.T @ places_N2.double())
        return cls(weight_D2=solved_D2.float())

    def __call__(self, latents: Tensor) -> Tensor:
        """Reads places: [..., D] to [..., 2]."""
        places: Tensor = _with_one(latents) @ self.weight_D2
        return places


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
