"""The predictor: context tokens and target positions in, predicted target tokens out.

Shape legend: B images or clips, K context tokens, M target blocks an image, T tokens of a target
block, D encoder width, P predictor width.
"""

from __future__ import annotations

import torch
from torch import nn

from models.encoders.blocks import LN_EPS, init_weights, run_blocks, transformer_blocks
from models.encoders.positions import make_positions


class Predictor(nn.Module):
    """A narrow ViT over context tokens and mask tokens (I-JEPA, section 3 and appendix A.1).

    Each target block is a sequence of its own: context tokens and that block's mask tokens attend
    to one another, blocks do not see each other.

    Args:
        grid: patches on a side of the encoder's grid.
        encoder_width: D.
        width: P; a multiple of `heads`, and of 4 for 2-D sine-cosine positions.
        depth: transformer blocks.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over P.
        tubes: time steps of the encoder's grid.
        positions: row of `models.encoders.positions.POSITIONS`.
        mask_tokens: one for each way of masking (V-JEPA: one a mask generator).
        zero_mask_tokens: start them at zero, as V-JEPA does, instead of at random.
        output_width: of what is predicted; None for D.
        activation_checkpointing: compute activations twice rather than keep them.
    """

    def __init__(
        self,
        *,
        grid: int,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        tubes: int = 1,
        positions: str = "sincos",
        mask_tokens: int = 1,
        zero_mask_tokens: bool = False,
        output_width: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.mlp_ratio, self.positions = heads, mlp_ratio, positions
        self.activation_checkpointing = activation_checkpointing
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(mask_tokens, 1, width))
        self.pos_embed, self.rope = make_positions(
            positions, width=width, heads=heads, side=grid, tubes=tubes
        )
        rotary = self.rope is not None
        self.blocks = transformer_blocks(width, depth, heads, mlp_ratio, rotary=rotary)
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.proj = nn.Linear(width, output_width or encoder_width)
        init_weights(self)
        if not zero_mask_tokens:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        context_BKD: torch.Tensor,
        context_ids_BK: torch.Tensor,
        target_ids_BMT: torch.Tensor,
        mask: int = 0,
    ) -> torch.Tensor:
        """Predicts the target encoder's tokens.

        Args:
            context_BKD: context encoder's output.
            context_ids_BK: int64, where the context tokens lie.
            target_ids_BMT: int64, the positions to predict.
            mask: which mask token to ask with.

        Returns:
            [B, M, T, D], or `output_width` wide.
        """
        B, K, _ = context_BKD.shape
        M, T = target_ids_BMT.shape[1:]
        # In the weights' dtype at once: under autocast, bf16 would narrow the residual stream and
        # the sum of the blocks' gradients.
        context_BKP = self.embed(context_BKD).to(self.norm.weight.dtype)
        context_BMKP = context_BKP[:, None].expand(-1, M, -1, -1)
        queries_BMTP = self.mask_token[mask].expand(B, M, T, -1)
        tokens = torch.cat([context_BMKP, queries_BMTP], dim=2).flatten(0, 1)  # [B * M, K + T, P]
        ids_BMK = context_ids_BK[:, None].expand(-1, M, -1)
        ids = torch.cat([ids_BMK, target_ids_BMT], dim=2).flatten(0, 1)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed[0][ids]
        rotation = None if self.rope is None else self.rope(ids)
        tokens = run_blocks(self.blocks, tokens, rotation, recompute=self.activation_checkpointing)
        predicted: torch.Tensor = self.proj(self.norm(tokens[:, K:]))
        return predicted.reshape(B, M, T, -1)
