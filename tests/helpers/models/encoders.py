"""Encoders with weights that attend, and their tokens of one picture written out in fp64.

Shape legend: K tokens that are kept, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from models.encoders.shape import EncoderShape
from models.encoders.vit import VisionTransformer
from models.media.preprocessing import EncoderInput, Preprocessing

PREP = Preprocessing(image_size=(32, 48), mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), patch_size=8)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth picture, so that resampling by other kernels is close."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoder_of(prep: Preprocessing, **shape: int) -> VisionTransformer:
    torch.manual_seed(0)
    default = {"image_size": prep.image_size, "patch_size": 8, "width": 48, "depth": 2, "heads": 2}
    encoder = VisionTransformer(EncoderShape(**{**default, "patch_std": 0.14, **shape}))
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(0.1 * torch.randn(value.shape))  # fresh weights attend almost evenly
    return encoder.eval()


def reference(
    encoder: VisionTransformer, one: EncoderInput, prep: Preprocessing, blocks: int | None = None
) -> torch.Tensor:
    """Tokens of one picture, [K, D], written out with plain torch: cut, add places, attend.

    Only the first `blocks` attend; None takes all.
    """
    x_HWC = (torch.from_numpy(np.array(one.pixels)).double() / 255 - torch.tensor(prep.mean)) / (
        torch.tensor(prep.std)
    )
    rows, columns = x_HWC.shape[0] // 8, x_HWC.shape[1] // 8
    state = {name: value.double() for name, value in encoder.state_dict().items()}
    grid = encoder.grid
    table = state["pos_embed"][0].view(grid.rows, grid.columns, -1)
    kept = np.ones((rows, columns), np.bool_) if one.kept is None else one.kept
    tokens = []
    for r, c in np.argwhere(kept).tolist():
        cut = x_HWC[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].permute(2, 0, 1).reshape(-1)
        embedded = state["patch_embed.proj.weight"].flatten(1) @ cut
        embedded = embedded + state["patch_embed.proj.bias"]
        tokens.append(embedded + _between(table, (r + 0.5) / rows, (c + 0.5) / columns))
    copy = encoder_copy(encoder)
    x_1KD = torch.stack(tokens)[None]
    for block in copy.blocks[:blocks]:
        x_1KD = block(x_1KD)
    return copy.norm(x_1KD)[0].detach()


def encoder_copy(encoder: VisionTransformer) -> VisionTransformer:
    copy = VisionTransformer(encoder.shape)
    copy.load_state_dict(encoder.state_dict())
    return copy.double().eval()


def _between(table: torch.Tensor, down: float, across: float) -> torch.Tensor:
    """The table at a place given in fractions of its height and width, linear between entries."""
    rows, columns, _ = table.shape
    r = min(max(down * rows - 0.5, 0), rows - 1)
    c = min(max(across * columns - 0.5, 0), columns - 1)
    r0, c0 = min(int(r), rows - 2), min(int(c), columns - 2)
    upper = table[r0, c0] * (1 - (c - c0)) + table[r0, c0 + 1] * (c - c0)
    lower = table[r0 + 1, c0] * (1 - (c - c0)) + table[r0 + 1, c0 + 1] * (c - c0)
    return upper * (1 - (r - r0)) + lower * (r - r0)
