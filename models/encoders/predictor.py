"""The predictor, which maps context tokens and target positions to predicted target tokens.

Shape legend: B images or clips, K context tokens, M target blocks per image, T tokens per target
block, D encoder width, P predictor width.
"""

from __future__ import annotations

import torch
from torch import nn

from models.encoders.blocks import LN_EPS, init_weights, run_blocks, transformer_blocks
from models.encoders.linear import Linear
from models.encoders.positions import embed_places, make_positions
from models.image_size import Grid


class Predictor(nn.Module):
    """A narrow ViT over context tokens and mask tokens (I-JEPA, section 3 and appendix A.1).

    Each target block is a sequence of its own: the context tokens and the mask tokens of one block
    attend to one another, and target blocks do not see each other.

    Args:
        grid: the encoder's grid of tokens.
        encoder_width: D.
        width: P, a multiple of `heads`; also a multiple of 4 for 2-D sine-cosine positions.
        depth: number of transformer blocks.
        heads: number of attention heads.
        mlp_ratio: hidden width of the MLP as a multiple of P.
        positions: entry of `models.encoders.positions.POSITIONS`.
        mask_tokens: number of mask tokens; V-JEPA has one per mask generator.
        zero_mask_tokens: initialises mask tokens to zero, as V-JEPA does, instead of randomly.
        output_width: width of the predictions; None for D.
        pool_context: reads only the mean of the context tokens, a bottleneck as in Token Bottleneck
            (Kim et al., 2025, arXiv 2507.06543), instead of every token.
        init: see `models.encoders.blocks.init_weights`.
        activation_checkpointing: recomputes activations in the backward pass to save memory.

    Raises:
        ValueError: the width or head size does not suit the positions.
    """

    def __init__(
        self,
        *,
        grid: Grid,
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        positions: str = "sincos",
        mask_tokens: int = 1,
        zero_mask_tokens: bool = False,
        output_width: int | None = None,
        pool_context: bool = False,
        init: str = "normal",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.pool_context = pool_context
        self.heads, self.mlp_ratio, self.positions = heads, mlp_ratio, positions
        self.activation_checkpointing = activation_checkpointing
        self.embed = Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(mask_tokens, 1, width))
        self.grid = grid
        self.pos_embed, self.rope = make_positions(positions, width=width, heads=heads, grid=grid)
        rotary = self.rope is not None
        self.blocks = transformer_blocks(width, depth, heads, mlp_ratio, rotary=rotary)
        self.norm = nn.LayerNorm(width, eps=LN_EPS)
        self.proj = Linear(width, output_width or encoder_width)
        init_weights(self, init)
        if not zero_mask_tokens:
            nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        context_BKD: torch.Tensor,
        context_ids_BK: torch.Tensor,
        target_ids_BMT: torch.Tensor,
        mask: int = 0,
        grids_B2: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predicts the tokens of the target encoder.

        Args:
            context_BKD: output of the context encoder, float [B, K, D].
            context_ids_BK: positions of the context tokens in the grid, int64 [B, K].
            target_ids_BMT: positions to predict, int64 [B, M, T].
            mask: index of the mask token to use.
            grids_B2: rows and columns of each one's own grid, int64 [B, 2]; None for the encoder's.

        Returns:
            Predicted tokens, [B, M, T, D], or [B, M, T, output_width] if that was given.
        """
        if self.pool_context:
            # The mean belongs to no place. It gets that of token 0 in every sample.
            context_BKD = context_BKD.mean(1, keepdim=True)
            context_ids_BK = torch.zeros_like(context_ids_BK[:, :1])
        B, K, _ = context_BKD.shape
        M, T = target_ids_BMT.shape[1:]
        # Cast to the weights' dtype right away. Under autocast, the residual stream and the sum of
        # the blocks' gradients would otherwise lose precision in bf16.
        context_BKP = self.embed(context_BKD).to(self.norm.weight.dtype)
        context_BMKP = context_BKP[:, None].expand(-1, M, -1, -1)
        queries_BMTP = self.mask_token[mask].expand(B, M, T, -1)
        tokens = torch.cat([context_BMKP, queries_BMTP], dim=2).flatten(0, 1)  # [B * M, K + T, P]
        ids_BMK = context_ids_BK[:, None].expand(-1, M, -1)
        ids = torch.cat([ids_BMK, target_ids_BMT], dim=2).flatten(0, 1)
        grids = None if grids_B2 is None else grids_B2.repeat_interleave(M, dim=0)
        if self.pos_embed is not None:
            tokens = tokens + embed_places(self.pos_embed[0], self.grid, ids, grids)
        rotation = None if self.rope is None else self.rope(ids, grids)
        tokens = run_blocks(self.blocks, tokens, rotation, recompute=self.activation_checkpointing)
        predicted: torch.Tensor = self.proj(self.norm(tokens[:, K:]))
        return predicted.reshape(B, M, T, -1)
