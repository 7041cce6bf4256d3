"""Encodes only the tokens that samples have, where grids differ or regions are left out.

Shape legend: B images or clips, N tokens of the largest grid, K tokens that a sample keeps at most,
P pixel values per token, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from models.encoders.vit import VisionTransformer, gather_tokens


@dataclass(frozen=True)
class KeptTokens:
    """The tokens of the samples of a batch; made of its entries `grids`, `kept_*`."""

    grids_B2: torch.Tensor
    """Rows and columns of each sample's grid, in which its tokens are numbered."""
    ids_BK: torch.Tensor
    valid_BK: torch.Tensor
    """False for padding."""

    @classmethod
    def of(cls, batch: Mapping[str, torch.Tensor]) -> KeptTokens | None:
        """Takes the entries of a batch; None if every sample has all tokens of the encoder."""
        if "kept_ids" not in batch:
            return None
        return cls(batch["grids"], batch["kept_ids"], batch["kept_valid"])

    def encode(
        self, encoder: VisionTransformer, patches_BNP: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes the kept tokens.

        Returns:
            The tokens at their places in the grid, [B, N, D], with zeros at all other places; and
            the mean of the kept ones, [B, D].
        """
        patches_BKP = gather_tokens(patches_BNP, self.ids_BK)
        tokens_BKD = encoder.forward_tokens(patches_BKP, self.ids_BK, self.grids_B2, self.valid_BK)
        tokens_BKD = tokens_BKD * self.valid_BK[..., None]
        places_BKD = self.ids_BK[..., None].expand_as(tokens_BKD)
        shape = (*patches_BNP.shape[:2], tokens_BKD.shape[-1])
        tokens_BND = tokens_BKD.new_zeros(shape).scatter_add(1, places_BKD, tokens_BKD)
        return tokens_BND, tokens_BKD.sum(1) / self.valid_BK.sum(1, keepdim=True)


def grids_of(kept: KeptTokens | None) -> torch.Tensor | None:
    """Returns each sample's rows and columns, int64 [B, 2]; None for the encoder's own grid."""
    return None if kept is None else kept.grids_B2
