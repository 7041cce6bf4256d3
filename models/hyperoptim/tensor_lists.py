"""Operations on lists of tensors (`torch._foreach_*`), in parts small enough to stay in cache.

A `Value` is one hyperparameter. It is a float if the host knows it, as always on a CPU, and a 0-dim
tensor if it is on a device that reading would wait for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

Value = float | Tensor

CHUNK_NUMEL = {"cpu": 2**18, "cuda": 2**24}
"""Elements in one part, by device. Scratch memory is a few times this for any model."""


@dataclasses.dataclass(frozen=True)
class Lists:
    """Parameters, gradients and buffers; entry i of every list belongs to parameter i."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]

    def chunks(self) -> Iterator[Lists]:
        """Yields parts of about `CHUNK_NUMEL` elements; a larger tensor is its own part."""
        most = CHUNK_NUMEL.get(self.params[0].device.type, 2**24) if self.params else 0
        start = size = 0
        for end, param in enumerate(self.params):
            if size and size + param.numel() > most:
                yield self._part(start, end)
                start, size = end, 0
            size += param.numel()
        if self.params:
            yield self._part(start, len(self.params))

    def _part(self, start: int, end: int) -> Lists:
        rows = slice(start, end)
        buffers = {name: tensors[rows] for name, tensors in self.buffers.items()}
        return Lists(self.params[rows], self.grads[rows], buffers)


def number(count: Tensor, on_host: bool) -> Value:
    """Returns a 0-dim counter as a `Value`."""
    return float(count) if on_host else count.double()


def at_least_1(step: Value) -> Value:
    """Returns at least 1, because 1 - beta^step would be 0 before the first step."""
    return step.clamp(min=1.0) if isinstance(step, Tensor) else max(step, 1.0)


def inner(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """Returns the sum of x * y over all entries, 0-dim float64; not finite if an entry is not."""
    if xs[0].is_cuda:  # few launches instead of one for each tensor
        products = torch._foreach_mul(xs, ys)
        return torch.cat([p.flatten() for p in products]).sum(dtype=torch.float64)
    dots = [torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(xs, ys, strict=True)]
    return torch.stack(dots).sum(dtype=torch.float64)


def as_number(value: Value, xs: list[Tensor]) -> Value:
    """Returns a value as foreach functions need it: a tensor gets the type of the list."""
    return value.to(xs[0].dtype) if isinstance(value, Tensor) else value


def scale_(xs: list[Tensor], factor: Value) -> None:
    """Multiplies xs by a factor, in place."""
    torch._foreach_mul_(xs, as_number(factor, xs))


def plus(xs: list[Tensor], value: Value) -> list[Tensor]:
    """Returns xs plus a value."""
    if isinstance(value, Tensor):
        # Without alpha, torch takes a tensor of one number for a number, and waits for it.
        return list(torch._foreach_add(xs, value.to(xs[0].dtype), alpha=1))
    return list(torch._foreach_add(xs, value))


def add_scaled_(xs: list[Tensor], ys: list[Tensor], factor: Value) -> None:
    """Adds factor * ys to xs, in place."""
    if isinstance(factor, Tensor):
        torch._foreach_add_(xs, torch._foreach_mul(ys, as_number(factor, xs)))
    else:
        torch._foreach_add_(xs, ys, alpha=factor)


def with_decay(grads: list[Tensor], params: list[Tensor], decay: Value) -> list[Tensor]:
    """Returns grads + decay * params, the gradients with an L2 penalty; `grads` itself for 0."""
    if isinstance(decay, Tensor):
        return list(torch._foreach_add(grads, torch._foreach_mul(params, as_number(decay, params))))
    return list(torch._foreach_add(grads, params, alpha=decay)) if decay else grads


def add_squares_(xs: list[Tensor], ys: list[Tensor], factor: Value) -> None:
    """Adds factor * ys^2 to xs, in place."""
    if isinstance(factor, Tensor):
        torch._foreach_addcmul_(xs, torch._foreach_mul(ys, as_number(factor, xs)), ys)
    else:
        torch._foreach_addcmul_(xs, ys, ys, value=factor)


def over_root(xs: list[Tensor], ys: list[Tensor], roots: list[Tensor]) -> list[Tensor]:
    """Returns x * y / root, and 0 where the root is 0, because x and y have only been 0 there."""
    floor = torch._foreach_clamp_min(roots, torch.finfo(roots[0].dtype).tiny)
    return list(torch._foreach_div(torch._foreach_mul(xs, ys), floor))


def only_if(gate: Tensor | None, xs: list[Tensor]) -> list[Tensor]:
    """Returns `xs`, or zeros if the 0-dim bool `gate` is false, even if `xs` holds NaN."""
    return xs if gate is None else [torch.where(gate, x, 0.0) for x in xs]


def gated(value: Value, gate: Tensor | None, closed: float) -> Value:
    """Returns `value`, or `closed` if `gate` is false."""
    if gate is None:
        return value
    # `where` would make float32 of a float; filling a tensor does not wait for the device.
    given = value if isinstance(value, Tensor) else gate.new_full((), value, dtype=torch.float64)
    return torch.where(gate, given, closed)


def keep_(olds: list[Tensor], news: list[Tensor], gate: Tensor | None) -> None:
    """Copies `news` into `olds` if `gate` is true."""
    if gate is None:
        torch._foreach_copy_(olds, news)
        return
    for old, new in zip(olds, news, strict=True):
        old.copy_(torch.where(gate, new, old))
