"""The whole numbers in a GGUF tensor: the scale and the centre of every group of 32 weights.

The `gguf` package gives the weights. Scales are read from the blocks, and then the levels follow:
(weight - centre) / scale. Other types (Q6_K with groups of 16, F16, ...) are rounded to 8 bits.
Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h

Legend: N blocks of a tensor, O outputs, I inputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, ReaderTensor
from gguf.quants import Q4_K
from torch import Tensor

from models.sink_lm.network.int4 import GROUP, Grid

Floats = npt.NDArray[np.float32]
Blocks = npt.NDArray[np.uint8]


def grid_of(tensor: ReaderTensor, weight_OI: Tensor) -> Grid:
    """Returns a matrix as levels, scales and centres.

    Args:
        tensor: as the file has it.
        weight_OI: the same, dequantised.
    """
    read = SCALES.get(tensor.tensor_type)
    if read is None:
        return Grid.rounded(weight_OI)
    blocks_N = np.asarray(tensor.data).reshape(-1, _block_bytes(tensor))
    shape = (len(weight_OI), weight_OI.shape[1] // GROUP)
    scale, centre = (torch.from_numpy(part.reshape(shape).copy()) for part in read(blocks_N))
    return Grid.of(weight_OI, scale, centre)


def has_few_bits(kind: GGMLQuantizationType) -> bool:
    """Whether four bits hold the levels of a tensor of this type."""
    return kind in (
        GGMLQuantizationType.Q4_0,
        GGMLQuantizationType.Q4_1,
        GGMLQuantizationType.Q4_K,
    )


def _block_bytes(tensor: ReaderTensor) -> int:
    per_block = 256 if tensor.tensor_type.name.endswith("_K") else GROUP
    return int(tensor.n_bytes * per_block // tensor.n_elements)


def _float16(blocks_N: Blocks, number: int) -> Floats:
    """Returns the float16 at this place of every block, [N, 1]."""
    part = np.ascontiguousarray(blocks_N[:, 2 * number : 2 * number + 2])
    return part.view(np.float16).astype(np.float32)


def _scaled(blocks_N: Blocks) -> tuple[Floats, Floats]:
    """Reads Q4_0, Q5_0 and Q8_0: a scale."""
    scale = _float16(blocks_N, 0)
    return scale, np.zeros_like(scale)


def _shifted(levels: int) -> Callable[[Blocks], tuple[Floats, Floats]]:
    """Reads Q4_1 and Q5_1, a scale and the least weight; the centre is half the levels above."""

    def read(blocks_N: Blocks) -> tuple[Floats, Floats]:
        scale = _float16(blocks_N, 0)
        return scale, _float16(blocks_N, 1) + levels / 2 * scale

    return read


def _nested(levels: int) -> Callable[[Blocks], tuple[Floats, Floats]]:
    """Reads Q4_K and Q5_K: 6-bit scales and minima of 8 groups, each times a float16."""

    def read(blocks_N: Blocks) -> tuple[Floats, Floats]:
        scales, minima = Q4_K.get_scale_min(np.ascontiguousarray(blocks_N[:, 4:16]))
        scale = _float16(blocks_N, 0) * scales.astype(np.float32)
        return scale, levels / 2 * scale - _float16(blocks_N, 1) * minima.astype(np.float32)

    return read


SCALES: dict[GGMLQuantizationType, Callable[[Blocks], tuple[Floats, Floats]]] = {
    GGMLQuantizationType.Q4_0: _scaled,
    GGMLQuantizationType.Q5_0: _scaled,
    GGMLQuantizationType.Q8_0: _scaled,
    GGMLQuantizationType.Q4_1: _shifted(16),
    GGMLQuantizationType.Q5_1: _shifted(32),
    GGMLQuantizationType.Q4_K: _nested(16),
    GGMLQuantizationType.Q5_K: _nested(32),
}
