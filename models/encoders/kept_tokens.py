"""Encodes only the tokens that samples have, where grids differ or regions are left out.

Shape legend: B images or clips, M patches of one time step, N tokens of the largest grid, K tokens
that a sample keeps at most, P pixel values per token, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from models.encoders.vit import VisionTransformer, gather_tokens


@dataclass(frozen=True)
class KeptTokens:
    """The tokens of the samples of a batch."""

    grids_B2: torch.Tensor
    """Rows and columns of each sample's grid, in which its tokens are numbered."""
    ids_BK: torch.Tensor
    """Numbers of the tokens, ascending; every time step takes M numbers."""
    valid_BK: torch.Tensor
    """False for padding, which stands after the tokens."""

    @classmethod
    def of(cls, batch: Mapping[str, torch.Tensor]) -> KeptTokens | None:
        """Takes the entries `grids` and `kept_*` of a training batch; None if it has none, because
        every sample has all tokens of the encoder."""
        if "kept_ids" not in batch:
            return None
        return cls(batch["grids"], batch["kept_ids"], batch["kept_valid"])

    @classmethod
    def of_mask(cls, grids_B2: torch.Tensor, kept_BM: torch.Tensor, tubes: int) -> KeptTokens:
        """Numbers the tokens of a mask of patches, which are the same in all time steps.

        Args:
            grids_B2: rows and columns of each sample's grid, int64 [B, 2].
            kept_BM: which patches are kept, bool [B, M], in raster order of each one's own grid.
            tubes: time steps.
        """
        kept_BN = kept_BM.repeat(1, tubes)
        most = int(kept_BN.sum(1).max())
        ids_BK = torch.argsort(~kept_BN, dim=1, stable=True)[:, :most]
        valid_BK = torch.gather(kept_BN, 1, ids_BK)
        return cls(grids_B2, ids_BK * valid_BK, valid_BK)

    def to(self, device: torch.device) -> KeptTokens:
        """Returns them on a device."""
        parts = (self.grids_B2, self.ids_BK, self.valid_BK)
        return KeptTokens(*(part.to(device, non_blocking=True) for part in parts))

    def encode(self, encoder: VisionTransformer, patches_BNP: torch.Tensor) -> torch.Tensor:
        """Encodes the kept tokens: [B, N, P] to [B, K, D]. No other patch reaches the encoder."""
        patches_BKP = gather_tokens(patches_BNP, self.ids_BK)
        return encoder.forward_tokens(patches_BKP, self.ids_BK, self.grids_B2, self.valid_BK)

    def mean(self, tokens_BKD: torch.Tensor) -> torch.Tensor:
        """Returns the mean of each sample's tokens, [B, D]."""
        total_BD = (tokens_BKD * self.valid_BK[..., None]).sum(1)
        return total_BD / self.valid_BK.sum(1, keepdim=True)

    def in_grid(self, tokens_BKD: torch.Tensor, count: int) -> torch.Tensor:
        """Puts tokens at their places: [B, K, D] to [B, `count`, D], zero at all other places."""
        tokens_BKD = tokens_BKD * self.valid_BK[..., None]
        places_BKD = self.ids_BK[..., None].expand_as(tokens_BKD)
        empty_BND = tokens_BKD.new_zeros(len(tokens_BKD), count, tokens_BKD.shape[-1])
        return empty_BND.scatter_add(1, places_BKD, tokens_BKD)


def grids_of(kept: KeptTokens | None) -> torch.Tensor | None:
    """Returns each sample's rows and columns, int64 [B, 2]; None for the encoder's own grid."""
    return None if kept is None else kept.grids_B2
