"""Fixed position embeddings."""

from __future__ import annotations

import torch


def sincos_2d(width: int, grid: int) -> torch.Tensor:
    """2-D sine-cosine table for a square patch grid (I-JEPA, appendix A.1).

    The first half of the dimensions encodes the column, the second the row; each half is
    [sin(w_i p) | cos(w_i p)] with w_i = 10000^(-i / (width / 4)).

    Args:
        width: dimensions; a multiple of 4.
        grid: patches on a side.

    Returns:
        float32 [grid * grid, width], patches in raster order.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, got {width}")
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    columns = line[None, :, :].expand(grid, -1, -1)
    rows = line[:, None, :].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(grid * grid, width).float()
