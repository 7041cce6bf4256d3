"""What the blocks of an encoder know: the features of all of them, or an encoder that ends early.

Every block's tokens go through the encoder's own final LayerNorm, as those of the last one do.

Shape legend: B images or clips, L blocks, K tokens that one keeps at most, D token width.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from models.encoders.input_batch import InputBatch, encode
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import Preprocessing


@torch.no_grad()
def block_means(encoder: VisionTransformer, batch: InputBatch, prep: Preprocessing) -> Tensor:
    """Encodes a batch once and returns the mean of each one's tokens after every block.

    Args:
        encoder: the encoder. Hooks stand on its blocks meanwhile.
        batch: made under `prep`.
        prep: gives the channel statistics.

    Returns:
        fp32 [B, L, D], on the device of the encoder. The last block's are those of `encode`.
    """
    kept = batch.to(encoder.norm.weight.device).kept(encoder.tubelet)
    means: list[Tensor] = []

    # Averaged at once, because the tokens of all blocks together would take L times the memory.
    def average(_block: nn.Module, _inputs: object, tokens_BKD: Tensor) -> None:
        normed_BKD = encoder.norm(tokens_BKD).float()
        means.append(normed_BKD.mean(dim=1) if kept is None else kept.mean(normed_BKD))

    hooks = [block.register_forward_hook(average) for block in encoder.blocks]
    try:
        encode(encoder, batch, prep)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(means, dim=1)


def first_blocks(encoder: VisionTransformer, count: int) -> VisionTransformer:
    """Returns a frozen encoder of the first `count` blocks and the final LayerNorm, with copies of
    the weights; the global RNG stays as it was."""
    with torch.random.fork_rng(devices=[]):
        shallow = VisionTransformer(dataclasses.replace(encoder.shape, depth=count))
    weights = encoder.state_dict()
    shallow.load_state_dict({name: weights[name] for name in shallow.state_dict()})
    weight = encoder.norm.weight
    return shallow.to(weight.device, weight.dtype).eval().requires_grad_(False)
