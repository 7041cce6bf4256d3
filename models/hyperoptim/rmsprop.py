"""RMSprop with momentum and L2 weight decay, as `torch.optim.RMSprop` without centring.

    g = grad + l w_      v = al v_ + (1 - al) g^2      s = sqrt(v)      d = s + e
    b = mu b_ + g / d    w = w_ - a b                  (without momentum b is g / d)

    dL/da  = -< G, b >                      dL/de = a < G, g / d^2 >
    dL/dal = a/2 < G g / (d^2 s), v_ - g^2 >                   with v_ - g^2 = (v - g^2) / al
    dL/dl  = -a < G/d - (1 - al) G g^2 / (d^2 s), w_ >         with w_ = w + a b
    dL/dmu = -a < G, b_ >                                      with b_ = (b - g/d) / mu

To tune the learning rate alone, nothing more is kept with momentum, and g without it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from models.hyperoptim.rules import Values
from models.hyperoptim.tensor_lists import (
    Lists,
    Value,
    add_scaled_,
    add_squares_,
    gated,
    inner,
    keep_,
    only_if,
    over_root,
    plus,
    scale_,
    with_decay,
)


class RMSprop:
    """The rule in this file's docstring."""

    names = ("lr", "alpha", "eps", "weight_decay", "momentum")

    def buffers(self, base: Values, tuned: Collection[str]) -> tuple[str, ...]:
        """Returns `square_avg`, `momentum_buffer` with momentum, and `last_grad` if needed."""
        momentum = ("momentum_buffer",) if base["momentum"] else ()
        last = () if momentum and set(tuned) <= {"lr"} else ("last_grad",)
        return ("square_avg", *momentum, *last)

    def hypergradients(
        self, lists: Lists, used: Values, step: Value, tuned: Collection[str]
    ) -> dict[str, Tensor]:
        """See `Rule.hypergradients`."""
        buffer = lists.buffers.get("momentum_buffer")
        if buffer and set(tuned) <= {"lr"}:
            return {"lr": -inner(lists.grads, buffer)} if tuned else {}
        lr, last = used["lr"], lists.buffers["last_grad"]
        root = torch._foreach_sqrt(lists.buffers["square_avg"])
        floor = plus(list(root), used["eps"])
        scaled = list(torch._foreach_div(lists.grads, floor))  # G / d
        step_now = list(torch._foreach_div(last, floor))  # g / d
        own = inner(scaled, last)
        moved = buffer or step_now
        along = inner(lists.grads, buffer) if buffer else own
        found = {"lr": -along}
        if buffer and "momentum" in tuned:
            found["momentum"] = -lr * (along - own) / used["momentum"]
        if "eps" in tuned:
            found["eps"] = lr * inner(scaled, step_now)
        if {"alpha", "weight_decay"} & set(tuned):
            pair = list(torch._foreach_mul(scaled, step_now))  # G g / d^2
            slope = over_root(pair, last, list(root))  # G g^2 / (d^2 s)
            alpha = used["alpha"]
            # v = s^2, so < G g / (d^2 s), v > = < G g / d^2, s >.
            found["alpha"] = lr / 2 * (inner(pair, list(root)) - inner(slope, last)) / alpha
            decayed = inner(scaled, lists.params) + lr * inner(scaled, moved)
            curved = inner(slope, lists.params) + lr * inner(slope, moved)
            found["weight_decay"] = -lr * (decayed - (1 - alpha) * curved)
        return {name: found[name] for name in tuned}

    def update(self, lists: Lists, values: Values, step: Value, gate: Tensor | None) -> None:
        """See `Rule.update`."""
        grads = only_if(gate, with_decay(lists.grads, lists.params, values["weight_decay"]))
        square, alpha = lists.buffers["square_avg"], gated(values["alpha"], gate, 1.0)
        scale_(square, alpha)
        add_squares_(square, grads, 1 - alpha)
        floor = plus(list(torch._foreach_sqrt(square)), values["eps"])
        rate = gated(values["lr"], gate, 0.0)
        if buffer := lists.buffers.get("momentum_buffer"):
            scale_(buffer, gated(values["momentum"], gate, 1.0))
            torch._foreach_addcdiv_(buffer, grads, floor)
            add_scaled_(lists.params, buffer, -rate)
        elif isinstance(rate, Tensor):
            add_scaled_(lists.params, list(torch._foreach_div(grads, floor)), -rate)
        else:
            torch._foreach_addcdiv_(lists.params, grads, floor, value=-rate)
        if "last_grad" in lists.buffers:
            keep_(lists.buffers["last_grad"], grads, gate)
