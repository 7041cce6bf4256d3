"""Linear layers that multiply fp32 matrices by oneDNN where torch would take a slower library.

On x86 torch multiplies fp32 matrices by Intel's MKL, which uses no AVX-512 on processors of other
makers. oneDNN, which is part of torch and multiplies its bf16 matrices, does: on an AMD EPYC it
takes half the time (benchmarks/training/step.md). Its products of fp32 are fp32; only the order of
the sums differs. What is chosen depends on the machine and on the layer, never on a measurement or
on the rows, so that runs repeat bit for bit. For inference, weights can lie in oneDNN's order.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST = 2**14
"""Weights below which a call of oneDNN costs more than it saves, at the usual numbers of rows."""
CPUINFO = Path("/proc/cpuinfo")


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    least = LEAST
    """See `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        return linear(x, self.weight, self.bias, self.least)


def use_linear(module: nn.Module, least: int = LEAST) -> None:
    """Makes the linear layers of a module `Linear`s, in place; names and weights stay.

    Args:
        module: the module.
        least: as in `linear`; 0 where every layer gets thousands of rows.
    """
    for part in module.modules():
        if type(part) in (nn.Linear, Linear):
            part.__class__ = Linear
            cast(Linear, part).least = least


class PackedLinear(nn.Module):
    """A linear layer for inference whose weight lies in oneDNN's own order.

    Otherwise oneDNN puts the weight into that order at every call, which is up to a tenth of the
    time of a single picture's layers. The products and sums are the same.

    Args:
        plain: the layer, on a CPU.
    """

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        weight = plain.weight.detach()
        self.packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = None if plain.bias is None else plain.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., in] to [..., out]."""
        return _product(x, self.packed, self.bias)


def pack_linear(module: nn.Module) -> None:
    """Packs a module's linear layers, in place: those that oneDNN computes on this machine.

    Their weights are no parameters any more; the module is for inference alone.

    Args:
        module: a module whose layers stay on this device and of this type.
    """
    for parent in list(module.modules()):
        for name, part in parent.named_children():
            if isinstance(part, nn.Linear) and _packs(part.weight):
                setattr(parent, name, PackedLinear(part))


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.numel() < LEAST:
        return False
    if weight.dtype == torch.bfloat16:
        backends: Any = torch.backends
        has_onednn = bool(backends.mkldnn.is_available())
        return has_onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and onednn_is_faster()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, least: int = LEAST) -> Tensor:
    """Returns x W^T + b, as `torch.nn.functional.linear`.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out].
        least: weights below which torch's own library is taken.
    """
    if weight.numel() < least or not _takes_onednn(x, weight):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled():
        product: Tensor = _Product.apply(x, weight, bias)
        return product
    return _product(x, weight, bias)


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)  # not fake, not sharded
    return (
        plain
        and x.ndim > 1
        and x.numel() > 0
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and onednn_is_faster()
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a processor with AVX-512 that MKL makes no use of."""
    backends: Any = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not CPUINFO.exists():
        return False
    return "GenuineIntel" not in CPUINFO.read_text()


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad, by_x, by_weight, by_bias = grads[0], None, None, None
        rows, flat = grad.flatten(0, -2), x.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            by_x = _product(grad, weight.t(), None)
        if ctx.needs_input_grad[1]:
            by_weight = _product(rows.t(), flat.t(), None)
        if ctx.needs_input_grad[2]:
            by_bias = rows.sum(0)
        return by_x, by_weight, by_bias
