"""Where tokens lie: fixed sine-cosine embeddings and 3-D rotary positions.

A grid holds `tubes` time steps (1 for images) of `side` x `side` patches. Tokens are numbered time
first, then row, then column.

Shape legend: B clips, H heads, N tokens of the grid, K tokens at hand, E dimensions of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn
from torch.nn import functional

POSITIONS = ("sincos", "rope", "rope_released")
"""sincos: added to the tokens. rope: V-JEPA 2's rotation of queries and keys, with both dimensions
of a pair turned by one angle. rope_released: the layout that its published weights were trained
with, where the two angles of a pair differ."""


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
    line = _sincos_1d(width // 2, grid)
    columns = line[None, :, :].expand(grid, -1, -1)
    rows = line[:, None, :].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(grid * grid, width).float()


def sincos_3d(width: int, side: int, tubes: int) -> torch.Tensor:
    """3-D sine-cosine table as V-JEPA lays it out, with equal shares for the axes.

    Time, row and column get 2 * ceil(width / 6) dimensions each, in this order and in the form of
    `sincos_2d`'s halves; what exceeds the width is cut from the end.

    Returns:
        float32 [tubes * side * side, width].
    """
    share = 2 * math.ceil(width / 6)
    line, shape = _sincos_1d(share, max(side, tubes)), (tubes, side, side, share)
    time = line[:tubes, None, None].expand(shape)
    rows = line[None, :side, None].expand(shape)
    columns = line[None, None, :side].expand(shape)
    table = torch.cat([time, rows, columns], dim=3)[..., :width]
    return table.reshape(tubes * side * side, width).float()


def _sincos_1d(width: int, length: int) -> torch.Tensor:
    """float64 [length, width]: [sin(w_i p) | cos(w_i p)] with w_i = 10000^(-i / (width / 2))."""
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Rotation(NamedTuple):
    """The rotation of some tokens' queries and keys; one for all heads and layers."""

    cos_B1KE: torch.Tensor
    sin_B1KE: torch.Tensor

    def __call__(self, heads_BHKE: torch.Tensor) -> torch.Tensor:
        """Turns the pairs (0, 1), (2, 3), ... of every head; keeps dtype and shape."""
        first, second = heads_BHKE[..., 0::2], heads_BHKE[..., 1::2]
        quarter_turn = torch.stack((-second, first), dim=-1).flatten(-2)
        cos, sin = self.cos_B1KE.to(heads_BHKE.dtype), self.sin_B1KE.to(heads_BHKE.dtype)
        return heads_BHKE * cos + quarter_turn * sin


class Rope(nn.Module):
    """3-D rotary positions (V-JEPA 2, arXiv 2506.09985), looked up by token number.

    Time, row and column turn 2 * floor(floor(E / 3) / 2) dimensions of a head each, in this order;
    the rest stays as it is.

    Args:
        head_dim: E, even and at least 6.
        side: patches on a side.
        tubes: time steps.
        layout: `rope` or `rope_released` of `POSITIONS`.
    """

    def __init__(self, head_dim: int, side: int, tubes: int, layout: str) -> None:
        super().__init__()
        angles_NE = rope_angles(head_dim, side, tubes, layout)
        self.cos_NE: torch.Tensor
        self.sin_NE: torch.Tensor
        self.register_buffer("cos_NE", angles_NE.cos().float(), persistent=False)
        self.register_buffer("sin_NE", angles_NE.sin().float(), persistent=False)

    def forward(self, ids_BK: torch.Tensor) -> Rotation:
        """The rotation of tokens by their number in the grid, int64 [B, K] (B may be 1)."""
        return Rotation(self.cos_NE[ids_BK][:, None], self.sin_NE[ids_BK][:, None])


def rope_angles(head_dim: int, side: int, tubes: int, layout: str) -> torch.Tensor:
    """The angle of every dimension at every place of the grid, in radians.

    Returns:
        float64 [tubes * side * side, head_dim]; zero for the dimensions that do not turn.

    Raises:
        ValueError: heads too narrow, or of odd size.
    """
    share = 2 * (head_dim // 3 // 2)
    if share == 0 or head_dim % 2:
        raise ValueError(f"3-D rotary positions need an even head size >= 6, got {head_dim}")
    frequencies = 10000.0 ** (-torch.arange(share // 2, dtype=torch.float64) / (share // 2))
    released = layout == "rope_released"
    turns = frequencies.repeat(2) if released else frequencies.repeat_interleave(2)
    steps, line = (torch.arange(n, dtype=torch.float64) for n in (tubes, side))
    places_N3 = torch.cartesian_prod(steps, line, line)
    angles = (places_N3[:, :, None] * turns).flatten(1)
    return functional.pad(angles, (0, head_dim - 3 * share))


class Grid(NamedTuple):
    """Places of tokens: `tubes` time steps (1 for images) of `side` x `side` patches."""

    side: int
    tubes: int

    def __str__(self) -> str:
        return f"{self.tubes} x {self.side} x {self.side}"


def sincos_table(width: int, grid: Grid) -> torch.Tensor:
    """The fixed table of a grid, float32 [N, width]: the 2-D one where there is a single time
    step."""
    return sincos_2d(width, grid.side) if grid.tubes == 1 else sincos_3d(width, *grid)


def fit_table(table_1ND: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """A position table of one grid made to suit another.

    The fixed table is computed anew. Any other was learned: its rows and columns are interpolated
    as timm does (bicubic, antialiased), its time steps linearly.

    Args:
        table_1ND: [1, N, D] of the grid `old`.
        old: its grid.
        new: the grid that is wanted.

    Returns:
        [1, N', D] of the grid `new`.
    """
    width = table_1ND.shape[-1]
    if torch.allclose(table_1ND[0].float(), sincos_table(width, old), atol=1e-5):
        return sincos_table(width, new)[None].to(table_1ND.dtype)
    sizes = {"new_size": [new.side, new.side], "old_size": [old.side, old.side]}
    steps = table_1ND.view(old.tubes, 1, old.side**2, width)
    resized = [resample_abs_pos_embed(step, num_prefix_tokens=0, **sizes) for step in steps]
    by_time = torch.cat(resized).flatten(1).T[None]  # [1, side * side * D, tubes]
    stretched = functional.interpolate(by_time, size=new.tubes, mode="linear")
    return stretched[0].T.reshape(1, new.tubes * new.side**2, width)


def make_positions(
    positions: str, *, width: int, heads: int, side: int, tubes: int
) -> tuple[nn.Parameter | None, Rope | None]:
    """What a transformer needs to place its tokens: a table to add, or a rotation; not both.

    The table is the 2-D one where there is a single time step. It is a parameter without gradient,
    so that it is saved as timm saves it.

    Args:
        positions: row of `POSITIONS`.
        width: of the tokens.
        heads: of the attention.
        side: patches on a side.
        tubes: time steps.

    Raises:
        ValueError: no such row, or a width or head size that it cannot serve.
    """
    if positions not in POSITIONS:
        raise ValueError(f"--model.positions: no {positions!r}; one of {', '.join(POSITIONS)}")
    if positions != "sincos":
        return None, Rope(width // heads, side, tubes, positions)
    table = sincos_table(width, Grid(side, tubes))
    return nn.Parameter(table[None], requires_grad=False), None
