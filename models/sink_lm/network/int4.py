"""Linear layers whose weights stay in the few bits of a GGUF file.

A group of 32 weights of a row shares a scale and a centre: weight = scale * level + centre. torch's
4-bit operator for CPUs reads 16 levels. Wider ones are the sum of two such matrices, side by side,
that read the same inputs: level = 16 * high + low. Activations, keys and values are bfloat16, and
the operator keeps scales and centres in bfloat16 and sums in float32.

Legend: B rows (sessions of a decode batch or tokens of a chunk), I inputs, O outputs, G groups of a
row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sink_lm.kernels.matrix import KernelMatrix

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch's stubs lack it
ACTIVATIONS = torch.bfloat16
GROUP = 32
# The operator stores outputs in blocks of so many.
BLOCK = 16
# Above so many rows bfloat16 weights are as fast (AVX512_BF16); `tune` measures it.
FEW_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A matrix as whole numbers, with a scale and a centre for each group."""

    levels_OI: Tensor
    """int8."""
    scale_OG: Tensor
    """float32."""
    centre_OG: Tensor
    """float32."""

    @property
    def is_narrow(self) -> bool:
        """Whether four bits hold every level."""
        return bool(self.levels_OI.min() >= -8 and self.levels_OI.max() <= 7)

    @classmethod
    def rounded(cls, weight_OI: Tensor) -> Grid:
        """Rounds every group of a matrix to 255 levels."""
        groups_OG32 = weight_OI.float().view(len(weight_OI), -1, GROUP)
        scale_OG = (groups_OG32.abs().amax(dim=2) / 127).to(ACTIVATIONS).float()
        return cls.of(weight_OI, scale_OG, torch.zeros_like(scale_OG))

    @classmethod
    def of(cls, weight_OI: Tensor, scale_OG: Tensor, centre_OG: Tensor) -> Grid:
        """Finds the levels of a matrix from its scales and centres."""
        groups_OG32 = weight_OI.float().view(len(weight_OI), -1, GROUP)
        scale_OG1 = torch.where(scale_OG == 0, 1, scale_OG)[..., None]
        levels_OG32 = ((groups_OG32 - centre_OG[..., None]) / scale_OG1).round().clamp(-128, 127)
        levels_OI = levels_OG32.to(torch.int8).flatten(1)
        return cls(levels_OI=levels_OI, scale_OG=scale_OG, centre_OG=centre_OG)

    @classmethod
    def stacked(cls, grids: list[Grid]) -> Grid:
        """Puts matrices of the same width one below the other."""
        return cls(
            levels_OI=torch.cat([grid.levels_OI for grid in grids]),
            scale_OG=torch.cat([grid.scale_OG for grid in grids]),
            centre_OG=torch.cat([grid.centre_OG for grid in grids]),
        )


class Int4Linear(nn.Module):
    """`nn.Linear` that reads 4-bit weights for a few rows and `wide` for more.

    Args:
        grid: the weights.
        wide: the same layer in bfloat16, bias included.
        bias_O: of the type of `wide`, or None.
        native: multiply by the project's own kernels instead of torch's operator.

    Attributes:
        inputs: columns of the weight.
        few_rows: the most rows that the 4-bit operator takes.
        matrix: what the own kernels read, None without them.

    Raises:
        RuntimeError: this torch has no such operator.
        NoKernels: `native`, and the own kernels cannot run here.
    """

    packed: Tensor
    scales_G_O2: Tensor
    bias: Tensor | None

    def __init__(
        self,
        grid: Grid,
        wide: nn.Module,
        bias_O: Tensor | None = None,
        *,
        native: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.planes = grid.levels_OI.shape[1], 1 if grid.is_narrow else 2
        nibbles_OI, scales_OG, centres_OG = _planes(grid)
        self.matrix: KernelMatrix | None = None
        if native:
            self.matrix = KernelMatrix(grid.levels_OI, grid.scale_OG, grid.centre_OG, bias_O)
        else:
            pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
            self.register_buffer("packed", pack(nibbles_OI, 1), persistent=False)
        # Layouts differ between kernels and processors: these and `wide` name the weights.
        pairs_OG2 = torch.stack((scales_OG, centres_OG), dim=-1).to(ACTIVATIONS)
        self.register_buffer("scales_G_O2", pairs_OG2.transpose(0, 1).contiguous())
        self.register_buffer("bias", bias_O)
        self.wide, self.few_rows = wide, FEW_ROWS

    def forward(self, x_BI: Tensor) -> Tensor:
        """Maps bfloat16 [B, I] to [B, O]."""
        if len(x_BI) > self.few_rows:
            out_BO: Tensor = self.wide(x_BI)
            return out_BO
        return self.narrow(x_BI)

    def narrow(self, x_BI: Tensor) -> Tensor:
        """Maps bfloat16 [B, I] to [B, O] with the 4-bit weights, whatever B is."""
        if self.matrix is not None:
            return self.matrix(x_BI)
        x_BI = x_BI.contiguous() if self.planes == 1 else torch.cat((x_BI, x_BI), dim=1)
        out_BO: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_BI, self.packed, GROUP, self.scales_G_O2
        )
        return out_BO if self.bias is None else out_BO + self.bias


def _planes(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Returns levels 0 to 15, int32 [O, I or 2 I], and their scales and centres, [O, G or 2 G].

    The operator computes scale * (level - 8) + centre.
    """
    levels_OI, scale_OG, centre_OG = grid.levels_OI.int(), grid.scale_OG, grid.centre_OG
    if grid.is_narrow:
        return levels_OI + 8, scale_OG, centre_OG
    # As the operator stores it: rounding 16 times a scale and the scale apart would not cancel.
    scale_OG = scale_OG.to(ACTIVATIONS).float()
    high_OI, low_OI = levels_OI >> 4, levels_OI & 15
    scales_OG = torch.cat((16 * scale_OG, scale_OG), dim=1)
    return (
        torch.cat((high_OI + 8, low_OI), dim=1),
        scales_OG,
        torch.cat((centre_OG, 8 * scale_OG), dim=1),
    )


class TiedWide(nn.Module):
    """The bfloat16 layer of a head that is the embedding: no copy of it.

    Args:
        embed: the embedding.
    """

    def __init__(self, embed: nn.Embedding) -> None:
        super().__init__()
        self._embed = (embed,)  # in a tuple: it is registered where it belongs

    def forward(self, x_BI: Tensor) -> Tensor:
        """Maps [B, I] to [B, O]."""
        return F.linear(x_BI, self._embed[0].weight)


def is_supported(device: torch.device | str) -> bool:
    """Whether this torch has the 4-bit operator for the device."""
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    return torch.device(device).type == "cpu" and all(hasattr(torch.ops.aten, n) for n in names)


def fits(outputs: int, inputs: int) -> bool:
    """Whether the operator takes a matrix of this shape."""
    return outputs % BLOCK == 0 and inputs % GROUP == 0
