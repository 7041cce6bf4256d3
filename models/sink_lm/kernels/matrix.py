"""A matrix of 4- or 8-bit weights in the layout that the kernels read.

Legend: B rows (sessions of a decode batch or tokens of a chunk), I inputs, O outputs, G groups of
32 inputs, N blocks of 16 outputs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from models.sink_lm.kernels.build import library

BLOCK, GROUP = 16, 32
# Bytes of one processor instruction: four inputs of each of 16 outputs.
TOGETHER = 4


class MatrixStruct(ctypes.Structure):
    """`Matrix` of matrix.h."""

    _fields_ = (
        ("levels", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("has_centre", ctypes.c_int64),
    )


class KernelMatrix:
    """weight = scale * level + centre, by groups of 32 inputs of a row.

    Args:
        levels_OI: int8; all between -8 and 7 take four bits each.
        scale_OG: float32, kept as float16, which a GGUF file has.
        centre_OG: float32, kept as float16.
        bias_O: any float type, or None.

    Attributes:
        struct: the same for the kernels, with the addresses of this object's tensors.

    Raises:
        NoKernels: they cannot run here.
    """

    def __init__(
        self, levels_OI: Tensor, scale_OG: Tensor, centre_OG: Tensor, bias_O: Tensor | None = None
    ) -> None:
        self._multiply = library().multiply_matrix
        bits = 4 if bool(levels_OI.min() >= -8 and levels_OI.max() <= 7) else 8
        self._levels = _packed(levels_OI, bits)
        parts = [scale_OG, centre_OG] if bool(centre_OG.any()) else [scale_OG]
        blocks_NPG16 = torch.stack([p.reshape(-1, BLOCK, p.shape[1]).mT for p in parts], dim=2)
        self._scales = blocks_NPG16.to(torch.float16).contiguous()
        self._bias_O = None if bias_O is None else bias_O.detach().float().contiguous()
        self.struct = MatrixStruct(
            levels=self._levels.data_ptr(),
            scales=self._scales.data_ptr(),
            bias=None if self._bias_O is None else self._bias_O.data_ptr(),
            outputs=levels_OI.shape[0],
            inputs=levels_OI.shape[1],
            bits=bits,
            has_centre=len(parts) > 1,
        )

    def __call__(self, x_BI: Tensor) -> Tensor:
        """Maps [B, I] to [B, O] of the same type, on as many threads as torch takes."""
        wide_BI = x_BI.float().contiguous()
        assert wide_BI.shape[1] == self.struct.inputs
        out_BO = torch.empty(len(x_BI), self.struct.outputs)
        self._multiply(
            ctypes.byref(self.struct),
            ctypes.c_void_p(wide_BI.data_ptr()),
            ctypes.c_int64(len(x_BI)),
            ctypes.c_void_p(out_BO.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )
        return out_BO.to(x_BI.dtype)


def _packed(levels_OI: Tensor, bits: int) -> Tensor:
    """Returns uint8 [N, G, bytes]: levels without a sign, two of four bits in a byte."""
    unsigned_OI = (levels_OI.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
    outputs, inputs = levels_OI.shape
    shape = (outputs // BLOCK, BLOCK, inputs // GROUP, GROUP // TOGETHER, TOGETHER)
    blocks = unsigned_OI.view(shape).permute(0, 2, 3, 1, 4)  # [N, G, 8, 16, 4]
    if bits == 4:
        low, high = blocks.chunk(2, dim=2)
        blocks = low | (high << 4)
    return blocks.flatten(2).contiguous()
