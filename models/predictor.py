"""The predictor: context tokens and target positions in, predicted target tokens out.

Shape legend: B images, K context tokens, M target blocks an image, T tokens of a target block,
D encoder width, P predictor width.
"""

from __future__ import annotations

import torch
from torch import nn

from models.positions import sincos_2d
from models.vit import LN_EPS, init_weights, transformer_blocks


class Predictor(nn.Module):
    """A narrow ViT over context tokens and mask tokens (I-JEPA, section 3 and appendix A.1).

    Each target block is a sequence of its own: context tokens and that block's mask tokens attend
    to one another, blocks do not see each other.

    Args:
        grid: patches on a side of the encoder's grid.
        encoder_width: D.
        width: P; a multiple of 4 and of `heads`.
        depth: transformer blocks.
        heads: attention heads.
    """

    def __init__(
        self, *, grid: int, encoder_width: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_2d(width, grid)[None], requires_grad=False)
        self.blocks = transformer_blocks(width, depth, heads, mlp_ratio=4.0)
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.proj = nn.Linear(width, encoder_width)
        init_weights(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        context_BKD: torch.Tensor,
        context_ids_BK: torch.Tensor,
        target_ids_BMT: torch.Tensor,
    ) -> torch.Tensor:
        """Predicts the target encoder's tokens.

        Args:
            context_BKD: context encoder's output.
            context_ids_BK: int64, where the context tokens lie.
            target_ids_BMT: int64, the positions to predict.

        Returns:
            [B, M, T, D].
        """
        B, K, _ = context_BKD.shape
        M, T = target_ids_BMT.shape[1:]
        context_BKP = self.embed(context_BKD) + self.pos_embed[0][context_ids_BK]
        queries_BMTP = self.mask_token + self.pos_embed[0][target_ids_BMT]
        context_BMKP = context_BKP[:, None].expand(-1, M, -1, -1)
        tokens = torch.cat([context_BMKP, queries_BMTP.to(context_BKP.dtype)], dim=2)
        tokens = tokens.flatten(0, 1)  # [B * M, K + T, P]
        for block in self.blocks:
            tokens = block(tokens)
        predicted: torch.Tensor = self.proj(self.norm(tokens[:, K:]))
        return predicted.reshape(B, M, T, -1)
