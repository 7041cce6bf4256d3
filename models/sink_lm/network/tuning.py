"""Makes a loaded decoder fast on this CPU: matrices in oneDNN's layout, ways chosen by measurement.

oneDNN multiplies a matrix that lies in its own blocks up to twice as fast as a plain one
(docs/language_model.md has a table). The plain matrix is given up for it.

Legend: B rows (sessions of a decode batch or tokens of a chunk), I inputs, O outputs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.sink_lm.network.int4 import ACTIVATIONS, Int4Linear
from models.sink_lm.network.llama import Llama

ROWS = (1, 2, 4, 8, 16, 32)
REPEATS = 5
MARGIN = 0.9
"""What the 4-bit operator may take of the other way's time: other work must not decide a tie."""
MEASURED = 30
"""Layers of the same shape measured in turn, so that the caches do not hold their weights."""

log = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """`nn.Linear` with its weight in oneDNN's layout, which nobody else can read.

    Args:
        weight_OI: float32 or bfloat16.
        bias_O: of the same type, or None.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        # A hint, how many rows there will be; any number of them is right.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), ROWS[-2])
        self._bias_O = None if bias_O is None else bias_O.detach()

    def forward(self, x_BI: Tensor) -> Tensor:
        """Maps [B, I] to [B, O]."""
        out_BO: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_BI, self._packed, self._bias_O, "none", [], ""
        )
        return out_BO


def tune(model: Llama) -> None:
    """Packs the decoder's matrices and measures how many rows its 4-bit matrices are best for.

    Takes about as long as some hundred decode steps. Packed weights can no longer be read
    afterwards. Does nothing to a decoder that is not on a CPU, and packs only where oneDNN
    multiplies the type of the weights.
    """
    if model.embed.weight.device.type != "cpu":
        return
    if can_pack(model.embed.weight.dtype):
        _pack(model)
    choose_rows(model)


def _pack(model: Llama) -> None:
    if model.head is None:
        model.head = PackedLinear(model.embed.weight, None)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PackedLinear(child.weight, child.bias))


def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch's oneDNN multiplies packed matrices of this type."""
    if not torch._C._has_mkldnn or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_rows(model: Llama) -> None:
    """Sets `few_rows` of every 4-bit layer to what was fastest for matrices of its place."""
    places: dict[str, list[Int4Linear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            places.setdefault(name.rpartition(".")[2], []).append(module)
    for place, linears in places.items():
        few_rows = _measured(linears[:MEASURED])
        for linear in linears:
            linear.few_rows = few_rows
        log.info("%s: 4-bit weights up to %d rows", place, few_rows)


@torch.inference_mode()
def _measured(linears: Sequence[Int4Linear]) -> int:
    """Returns the most rows at which the 4-bit operator is the faster, 0 for none."""
    best = 0
    inputs = linears[0].inputs
    for rows in ROWS:
        x_BI = torch.zeros(rows, inputs, dtype=ACTIVATIONS)
        narrow = _seconds([linear.narrow for linear in linears], x_BI)
        if narrow > MARGIN * _seconds([linear.wide for linear in linears], x_BI):
            break
        best = rows
    return best


def _seconds(ways: Sequence[Callable[[Tensor], Tensor]], x_BI: Tensor) -> float:
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for way in ways:
            way(x_BI)
        times.append(time.perf_counter() - started)
    return min(times)
