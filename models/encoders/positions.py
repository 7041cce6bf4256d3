"""Position encodings of tokens: fixed sine-cosine embeddings and 3-D rotary positions.

Shape legend: B clips, H attention heads, N tokens in the grid, K tokens in the sequence,
E dimensions per head, D token width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from models.encoders.timm_parts import resample_abs_pos_embed
from models.image_size import Grid

POSITIONS = ("sincos", "rope", "rope_released")
"""Values of `--model.positions`.

sincos: a fixed table is added to the tokens. rope: queries and keys are rotated as in V-JEPA 2, and
both dimensions of a pair turn by the same angle. rope_released: the layout with which V-JEPA 2's
published weights were trained, where the two angles of a pair differ.
"""


def sincos_2d(width: int, rows: int, columns: int) -> torch.Tensor:
    """Computes the 2-D sine-cosine table of a patch grid (I-JEPA, appendix A.1).

    The first half of the dimensions encodes the column, the second half the row. Each half is
    [sin(w_i p) | cos(w_i p)] with w_i = 10000^(-i / (width / 4)).

    Args:
        width: number of dimensions, a multiple of 4.
        rows: rows of the grid.
        columns: columns of the grid.

    Returns:
        float32 [rows * columns, width], patches in raster order.

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, got {width}")
    line = _sincos_1d(width // 2, max(rows, columns))
    by_column = line[None, :columns].expand(rows, -1, -1)
    by_row = line[:rows, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=2).reshape(rows * columns, width).float()


def sincos_3d(width: int, grid: Grid) -> torch.Tensor:
    """Computes the 3-D sine-cosine table in V-JEPA's layout, with an equal share for each axis.

    Time, row and column get 2 * ceil(width / 6) dimensions each, in this order. Each share has the
    form of one half of `sincos_2d`. Dimensions beyond `width` are cut off at the end.

    Args:
        width: number of dimensions.
        grid: the grid of tokens.

    Returns:
        float32 [N, width].
    """
    share = 2 * math.ceil(width / 6)
    line, shape = _sincos_1d(share, max(grid)), (grid.tubes, grid.rows, grid.columns, share)
    time = line[: grid.tubes, None, None].expand(shape)
    rows = line[None, : grid.rows, None].expand(shape)
    columns = line[None, None, : grid.columns].expand(shape)
    table = torch.cat([time, rows, columns], dim=3)[..., :width]
    return table.reshape(grid.tokens, width).float()


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
        grid: the grid of tokens.
        layout: `rope` or `rope_released`, see `POSITIONS`.

    Raises:
        ValueError: `head_dim` is odd or less than 6.
    """

    def __init__(self, head_dim: int, grid: Grid, layout: str) -> None:
        super().__init__()
        self.grid, self.layout, self.head_dim = grid, layout, head_dim
        angles_NE = rope_angles(head_dim, grid_places(grid), layout)
        self.cos_NE: torch.Tensor
        self.sin_NE: torch.Tensor
        self.register_buffer("cos_NE", angles_NE.cos().float(), persistent=False)
        self.register_buffer("sin_NE", angles_NE.sin().float(), persistent=False)

    def forward(self, ids_BK: torch.Tensor, grids_B2: torch.Tensor | None = None) -> Rotation:
        """Returns the rotation of tokens.

        Args:
            ids_BK: numbers of the tokens in their grid, int64 [B, K] or [1, K].
            grids_B2: rows and columns of each one's own grid, int64 [B, 2]; None for the grid that
                this was built for.
        """
        if grids_B2 is None:
            return Rotation(self.cos_NE[ids_BK][:, None], self.sin_NE[ids_BK][:, None])
        places_BK3 = fitted_places(ids_BK, grids_B2, self.grid)
        angles_BKE = rope_angles(self.head_dim, places_BK3, self.layout)[:, None]
        return Rotation(angles_BKE.cos().float(), angles_BKE.sin().float())


def rope_angles(head_dim: int, places_3: torch.Tensor, layout: str) -> torch.Tensor:
    """Computes the angle of every dimension at some places; see `Rope`.

    Args:
        head_dim: E.
        places_3: time, row and column, float64 [..., 3].
        layout: `rope` or `rope_released`, see `POSITIONS`.

    Returns:
        Radians, float64 [..., E]; 0 for dimensions that are not rotated.

    Raises:
        ValueError: `head_dim` is odd or less than 6.
    """
    share = 2 * (head_dim // 3 // 2)
    if share == 0 or head_dim % 2:
        raise ValueError(f"3-D rotary positions need an even head size >= 6, got {head_dim}")
    places_3 = places_3.double()
    steps = torch.arange(share // 2, dtype=torch.float64, device=places_3.device)
    frequencies = 10000.0 ** (-steps / (share // 2))
    released = layout == "rope_released"
    turns = frequencies.repeat(2) if released else frequencies.repeat_interleave(2)
    angles = (places_3[..., None] * turns).flatten(-2)
    return functional.pad(angles, (0, head_dim - 3 * share))


def grid_places(grid: Grid) -> torch.Tensor:
    """Returns time, row and column of every token of a grid, float64 [N, 3]."""
    sides = (grid.tubes, grid.rows, grid.columns)
    return torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in sides))


def fitted_places(ids_BK: torch.Tensor, grids_B2: torch.Tensor, model: Grid) -> torch.Tensor:
    """Returns the places of tokens whose grids differ, in steps of the encoder's grid.

    Every grid is stretched over the encoder's, so that the edges of the picture meet.

    Args:
        ids_BK: numbers of the tokens, each in its own grid, int64 [B, K]. Every time step takes as
            many numbers as one of the encoder's grid, also where a sample has fewer tokens.
        grids_B2: rows and columns of every grid, int64 [B, 2]; time steps are the encoder's.
        model: the encoder's grid.

    Returns:
        Time, row and column, float32 [B, K, 3]. Whole numbers if the grids are the encoder's.
    """
    rows_B1, columns_B1 = grids_B2[:, :1], grids_B2[:, 1:]
    inside_BK = ids_BK % model.per_step
    row_BK = (inside_BK // columns_B1 + 0.5) * (model.rows / rows_B1) - 0.5
    column_BK = (inside_BK % columns_B1 + 0.5) * (model.columns / columns_B1) - 0.5
    return torch.stack([(ids_BK // model.per_step).float(), row_BK, column_BK], dim=-1)


def embed_places(
    table_ND: torch.Tensor, grid: Grid, ids_BK: torch.Tensor, grids_B2: torch.Tensor | None
) -> torch.Tensor:
    """Looks the position embeddings of tokens up in a table.

    Args:
        table_ND: table of the encoder's grid, [N, D].
        grid: the encoder's grid.
        ids_BK: numbers of the tokens in their grid, int64 [B, K] or [1, K].
        grids_B2: rows and columns of each one's own grid, int64 [B, 2], for which the table is
            interpolated; None for the encoder's grid.

    Returns:
        float [B, K, D], or [1, K, D] if there is one row of numbers.
    """
    if grids_B2 is None:
        return table_ND[ids_BK]
    return table_at(table_ND, fitted_places(ids_BK, grids_B2, grid), grid)


def table_at(table_ND: torch.Tensor, places_BK3: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Interpolates a position table linearly between rows and columns.

    Args:
        table_ND: table of `grid`, [N, D].
        places_BK3: result of `fitted_places`. Beyond the edge, the outermost position is taken.
        grid: grid of the table.

    Returns:
        float [B, K, D].
    """
    time_BK, row_BK, column_BK = places_BK3.unbind(-1)
    row_BK, column_BK = row_BK.clamp(0, grid.rows - 1), column_BK.clamp(0, grid.columns - 1)
    top_BK, left_BK = row_BK.floor(), column_BK.floor()
    down_BK1, right_BK1 = (row_BK - top_BK)[..., None], (column_BK - left_BK)[..., None]
    bottom_BK, end_BK = (
        (top_BK + 1).clamp(max=grid.rows - 1),
        (left_BK + 1).clamp(max=grid.columns - 1),
    )

    def at(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return table_ND[((time_BK * grid.rows + row) * grid.columns + column).long()]

    above = torch.lerp(at(top_BK, left_BK), at(top_BK, end_BK), right_BK1)
    below = torch.lerp(at(bottom_BK, left_BK), at(bottom_BK, end_BK), right_BK1)
    return torch.lerp(above, below, down_BK1)


def sincos_table(width: int, grid: Grid) -> torch.Tensor:
    """Computes the fixed table of a grid, float32 [N, width].

    A grid of a single time step gets the 2-D table, every other grid the 3-D table.
    """
    return sincos_2d(width, grid.rows, grid.columns) if grid.tubes == 1 else sincos_3d(width, grid)


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
    sizes = {"new_size": [new.rows, new.columns], "old_size": [old.rows, old.columns]}
    steps = table_1ND.view(old.tubes, 1, old.per_step, width)
    resized = [resample_abs_pos_embed(step, num_prefix_tokens=0, **sizes) for step in steps]
    by_time = torch.cat(resized).flatten(1).T[None]  # [1, per_step * D, tubes]
    stretched = functional.interpolate(by_time, size=new.tubes, mode="linear")
    return stretched[0].T.reshape(1, new.tokens, width)


def make_positions(
    positions: str, *, width: int, heads: int, grid: Grid
) -> tuple[nn.Parameter | None, Rope | None]:
    """Makes the position encoding of a transformer: either a table to add or a rotation.

    The table, see `sincos_table`, is a parameter without gradient, so that it appears in the state
    dict under the same name as timm's.

    Args:
        positions: entry of `POSITIONS`.
        width: token width.
        heads: number of attention heads.
        grid: the grid of tokens.

    Returns:
        (table [1, N, width], None) for `sincos`, (None, rotation) otherwise.

    Raises:
        ValueError: there is no such entry, or it does not support this width or head size.
    """
    if positions not in POSITIONS:
        raise ValueError(f"--model.positions: no {positions!r}; one of {', '.join(POSITIONS)}")
    if positions != "sincos":
        return None, Rope(width // heads, grid, positions)
    return nn.Parameter(sincos_table(width, grid)[None], requires_grad=False), None
