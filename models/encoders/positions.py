"""Position encodings of tokens: fixed sine-cosine embeddings and 3-D rotary positions.

A grid holds `tubes` time steps (1 for images) of `side` x `side` patches. Tokens are numbered in
order of time, then row, then column.

Shape legend: B clips, H attention heads, N tokens in the grid, K tokens in the sequence,
E dimensions per head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn
from torch.nn import functional

POSITIONS = ("sincos", "rope", "rope_released")
"""Values of `--model.positions`.

sincos: a fixed table is added to the tokens. rope: queries and keys are rotated as in V-JEPA 2, and
both dimensions of a pair turn by the same angle. rope_released: the layout with which V-JEPA 2's
published weights were trained, where the two angles of a pair differ.
"""


def sincos_2d(width: int, grid: int) -> torch.Tensor:
    """Computes the 2-D sine-cosine table of a square patch grid (I-JEPA, appendix A.1).

    The first half of the dimensions encodes the column, the second half the row. Each half is
    [sin(w_i p) | cos(w_i p)] with w_i = 10000^(-i / (width / 4)).

    Args:
        width: number of dimensions, a multiple of 4.
        grid: patches per side.

    Returns:
        float32 [grid * grid, width], patches in raster order.

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, got {width}")
    line = _sincos_1d(width // 2, grid)
    columns = line[None, :, :].expand(grid, -1, -1)
    rows = line[:, None, :].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(grid * grid, width).float()


def sincos_3d(width: int, side: int, tubes: int) -> torch.Tensor:
    """Computes the 3-D sine-cosine table in V-JEPA's layout, with an equal share for each axis.

    Time, row and column get 2 * ceil(width / 6) dimensions each, in this order. Each share has the
    form of one half of `sincos_2d`. Dimensions beyond `width` are cut off at the end.

    Args:
        width: number of dimensions.
        side: patches per side.
        tubes: number of time steps.

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
    """Returns float64 [length, width], [sin(w_i p) | cos(w_i p)]; w_i = 10000^(-2i / width)."""
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Rotation(NamedTuple):
    """The rotation of the queries and keys of some tokens; all heads and layers share it."""

    cos_B1KE: torch.Tensor
    sin_B1KE: torch.Tensor

    def __call__(self, heads_BHKE: torch.Tensor) -> torch.Tensor:
        """Rotates dimension pairs (0, 1), (2, 3), ... of every head; keeps dtype and shape."""
        first, second = heads_BHKE[..., 0::2], heads_BHKE[..., 1::2]
        quarter_turn = torch.stack((-second, first), dim=-1).flatten(-2)
        cos, sin = self.cos_B1KE.to(heads_BHKE.dtype), self.sin_B1KE.to(heads_BHKE.dtype)
        return heads_BHKE * cos + quarter_turn * sin


class Rope(nn.Module):
    """3-D rotary positions (V-JEPA 2, arXiv 2506.09985), looked up by token number.

    Time, row and column each rotate 2 * floor(floor(E / 3) / 2) dimensions of every head, in this
    order. The remaining dimensions are left unchanged.

    Args:
        head_dim: E, even and at least 6.
        side: patches per side.
        tubes: number of time steps.
        layout: `rope` or `rope_released`, see `POSITIONS`.

    Raises:
        ValueError: `head_dim` is odd or less than 6.
    """

    def __init__(self, head_dim: int, side: int, tubes: int, layout: str) -> None:
        super().__init__()
        angles_NE = rope_angles(head_dim, side, tubes, layout)
        self.cos_NE: torch.Tensor
        self.sin_NE: torch.Tensor
        self.register_buffer("cos_NE", angles_NE.cos().float(), persistent=False)
        self.register_buffer("sin_NE", angles_NE.sin().float(), persistent=False)

    def forward(self, ids_BK: torch.Tensor) -> Rotation:
        """Returns the rotation of tokens by their numbers in the grid, int64 [B, K] or [1, K]."""
        return Rotation(self.cos_NE[ids_BK][:, None], self.sin_NE[ids_BK][:, None])


def rope_angles(head_dim: int, side: int, tubes: int, layout: str) -> torch.Tensor:
    """Computes the angle of every dimension at every position of the grid; see `Rope`.

    Returns:
        Radians, float64 [tubes * side * side, head_dim]; 0 for dimensions that are not rotated.

    Raises:
        ValueError: `head_dim` is odd or less than 6.
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
    """A grid of tokens: `tubes` time steps (1 for images) of `side` x `side` patches."""

    side: int
    tubes: int

    def __str__(self) -> str:
        return f"{self.tubes} x {self.side} x {self.side}"


def sincos_table(width: int, grid: Grid) -> torch.Tensor:
    """Computes the fixed table of a grid, float32 [N, width].

    A grid of a single time step gets the 2-D table, every other grid the 3-D table.
    """
    return sincos_2d(width, grid.side) if grid.tubes == 1 else sincos_3d(width, *grid)


def fit_table(table_1ND: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """Adapts a position table from one grid to another.

    The fixed table is recomputed for the new grid. Any other table was learned and is interpolated:
    rows and columns as timm does it (bicubic, antialiased), time steps linearly.

    Args:
        table_1ND: table of the grid `old`, [1, N, D].
        old: grid of the table.
        new: grid to adapt it to.

    Returns:
        Table of the grid `new`, [1, N', D].
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
    """Makes the position encoding of a transformer: either a table to add or a rotation.

    The table, see `sincos_table`, is a parameter without gradient, so that it appears in the state
    dict under the same name as timm's.

    Args:
        positions: entry of `POSITIONS`.
        width: token width.
        heads: number of attention heads.
        side: patches per side.
        tubes: number of time steps.

    Returns:
        (table [1, N, width], None) for `sincos`, (None, rotation) otherwise.

    Raises:
        ValueError: there is no such entry, or it does not support this width or head size.
    """
    if positions not in POSITIONS:
        raise ValueError(f"--model.positions: no {positions!r}; one of {', '.join(POSITIONS)}")
    if positions != "sincos":
        return None, Rope(width // heads, side, tubes, positions)
    table = sincos_table(width, Grid(side, tubes))
    return nn.Parameter(table[None], requires_grad=False), None
