"""What is used of timm, imported without PyTorch's compiler."""

from __future__ import annotations

from models.encoders.lazy_compiler import compiler_on_demand

with compiler_on_demand():
    from timm import create_model
    from timm.layers.attention import Attention
    from timm.layers.pos_embed import resample_abs_pos_embed
    from timm.models.vision_transformer import Block, VisionTransformer

__all__ = ["Attention", "Block", "VisionTransformer", "create_model", "resample_abs_pos_embed"]
