"""Linear layers with 8-bit weights: half of bfloat16's memory, and of what a single session reads.

A row of weights is int8 numbers times one scale; activations, keys and values stay bfloat16.
docs/language_model.md compares it with the other types.

Legend: B rows (sessions of a decode batch or tokens of a chunk), I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = torch.bfloat16
# torch's int8 kernel reads weights at the speed of memory, but multiplies slowly: for more rows
# than these it pays to widen the weights first (measured with AVX512_BF16).
FEW_ROWS = 4
# Numbers widened at once: few enough to be still in the cache when they are multiplied.
WIDENED = 2**21


class Int8Linear(nn.Module):
    """`nn.Linear` whose weight is `weight_OI` (int8) times `scale_O`.

    Args:
        inputs: columns of the weight.
        outputs: rows of the weight.
        bias: whether the layer has a bias.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(outputs, dtype=ACTIVATIONS))
        self.register_buffer("bias", torch.zeros(outputs, dtype=ACTIVATIONS) if bias else None)

    def forward(self, x_BI: Tensor) -> Tensor:
        """Maps bfloat16 [B, I] to [B, O]."""
        if len(x_BI) <= FEW_ROWS and x_BI.device.type == "cpu":
            out_BO = torch._weight_int8pack_mm(x_BI.contiguous(), self.weight, self.scale)
        else:
            blocks = torch.split(self.weight, max(WIDENED // self.weight.shape[1], 1))
            parts = [F.linear(x_BI, block_OI.to(x_BI.dtype)) for block_OI in blocks]
            out_BO = (torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]) * self.scale
        return out_BO if self.bias is None else out_BO + self.bias


def quantised(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds every row to 255 levels.

    Returns:
        int8 [O, I] and the scales, bfloat16 [O].
    """
    wide_OI = weight_OI.to(torch.float32)
    scale_O = (wide_OI.abs().amax(dim=1) / 127).clamp(min=1e-30).to(ACTIVATIONS)
    # Divided by the scale as it is stored: rounding it later would stretch the whole row.
    levels_OI = (wide_OI / scale_O[:, None].float()).round().clamp(-127, 127)
    return levels_OI.to(torch.int8), scale_O


def without_weights(linear: nn.Linear) -> Int8Linear:
    """Returns an int8 layer of the same shape, to load weights into."""
    return Int8Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
