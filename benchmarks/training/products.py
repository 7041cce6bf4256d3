"""What a step of ViT-S/16 is made of on a CPU: matrix products by library, and ways of attention.

    python benchmarks/training/products.py      # seconds; CPU time of one thread

Products are those of a linear layer of 8 images: forward, and the gradients of its input and its
weights. Attention is forward and backward from the layer's queries, keys and values: torch's fused
kernel, the plain products that training takes in bf16, and the same written down by hand with a
backward pass of its own, which avoids copies.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from models.encoders.linear import _product, onednn_is_faster

ROWS = 8 * 196
LAYERS = ((384, 1152), (384, 384), (384, 1536), (1536, 384))
HEADS = {"encoder": (8, 6, 196, 64), "predictor": (32, 12, 100, 32)}
"""Sequences, heads, tokens, and width of a head."""


def milliseconds(function: Callable[[], object], repeats: int = 12) -> float:
    """CPU time of the calling thread, median, after two calls that are not counted."""
    times = []
    for number in range(repeats + 2):
        start = time.thread_time()
        function()
        if number > 1:
            times.append(time.thread_time() - start)
    return 1e3 * statistics.median(times)


def products(width: int, out: int) -> dict[str, float]:
    """Milliseconds of the three products of a layer together, by library and type."""
    x, weight, grad = torch.randn(ROWS, width), torch.randn(out, width), torch.randn(ROWS, out)
    found = {}
    for name, dtype in (("torch fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, w, g = (t.to(dtype) for t in (x, weight, grad))
        parts = (lambda a=a, w=w: a @ w.t(), lambda g=g, w=w: g @ w, lambda g=g, a=a: g.t() @ a)
        found[name] = sum(milliseconds(part) for part in parts)
    parts = (
        lambda: _product(x, weight, None),
        lambda: _product(grad, weight.t(), None),
        lambda: _product(grad.t(), x.t(), None),
    )
    return found | {"oneDNN fp32": sum(milliseconds(part) for part in parts)}


class ByHand(torch.autograd.Function):
    """Attention [B, N, 3, H, D] to [B, N, H * D] by batched products of contiguous heads."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        B, N, _, H, D = qkv.shape
        q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, B * H, N, D).unbind(0)
        weights = torch.bmm(q, k.mT).mul_(D**-0.5).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.sizes = (B, N, H, D)
        return torch.bmm(weights, v).view(B, H, N, D).transpose(1, 2).reshape(B, N, H * D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        q, k, v, weights = ctx.saved_tensors
        B, N, H, D = ctx.sizes
        grad = grads[0].view(B, N, H, D).transpose(1, 2).reshape(B * H, N, D)
        by = grad.new_empty(3, B * H, N, D)
        torch.bmm(weights.mT, grad, out=by[2])
        scores = torch.bmm(grad, v.mT)
        scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype).mul_(D**-0.5)
        torch.bmm(scores, k, out=by[0])
        torch.bmm(scores.mT, q, out=by[1])
        return by.view(3, B, H, N, D).permute(1, 3, 0, 2, 4).reshape(B, N, 3, H, D)


def heads_of(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def plain(qkv: Tensor) -> Tensor:
    q, k, v = heads_of(qkv)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def fused(qkv: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(*heads_of(qkv)).transpose(1, 2).flatten(2)


WAYS = {"fused": fused, "plain": plain, "by hand": ByHand.apply}


def attention(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of forward and backward by way."""
    B, H, N, D = sizes
    qkv = torch.randn(B, N, 3, H, D).to(dtype).requires_grad_()
    grad = torch.randn(B, N, H * D).to(dtype)
    return {
        name: milliseconds(lambda way=way: torch.autograd.grad(way(qkv), qkv, grad), 6)
        for name, way in WAYS.items()
    }


def main() -> None:
    torch.set_num_threads(1)
    ratios = []
    print("| layer | torch fp32, ms | oneDNN fp32 | bf16 |\n|---|---|---|---|")
    for width, out in LAYERS:
        found = products(width, out)
        ratios.append(found["torch fp32"] / found["oneDNN fp32"])
        cells = (found[name] for name in ("torch fp32", "oneDNN fp32", "bf16"))
        print(f"| {width} to {out} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    print("\n| attention | type | " + " | ".join(WAYS) + " |\n|---|---|---|---|---|")
    for name, sizes in HEADS.items():
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            cells = attention(sizes, dtype).values()
            print(f"| {name} | {kind} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    taken = "taken" if onednn_is_faster() else "not taken"
    print(
        f"result: oneDNN's fp32 products {min(ratios):.2f} to {max(ratios):.2f} times as fast as "
        f"torch's own, {taken} on this machine"
    )


if __name__ == "__main__":
    main()
