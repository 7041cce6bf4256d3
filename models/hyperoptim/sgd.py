"""SGD with momentum and L2 weight decay, as `torch.optim.SGD` without dampening and Nesterov.

    g = grad + l w_      b = mu b_ + g      w = w_ - a b

    dL/da  = -< G, b >        dL/dl = -a < G, w_ >       with w_ = w + a b
    dL/dmu = -a < G, b_ >                                with b_ = (b - g) / mu

Without momentum b is g. Plain SGD does not keep g, so tuning it costs one buffer.
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
    gated,
    inner,
    keep_,
    only_if,
    scale_,
    with_decay,
)


class SGD:
    """The rule in this file's docstring."""

    names = ("lr", "momentum", "weight_decay")

    def buffers(self, base: Values, tuned: Collection[str]) -> tuple[str, ...]:
        """Returns `momentum_buffer` with momentum; `last_grad` without it, or if it is tuned."""
        momentum = ("momentum_buffer",) if base["momentum"] else ()
        return (*momentum, "last_grad") if not momentum or "momentum" in tuned else momentum

    def hypergradients(
        self, lists: Lists, used: Values, step: Value, tuned: Collection[str]
    ) -> dict[str, Tensor]:
        """See `Rule.hypergradients`."""
        grads, lr = lists.grads, used["lr"]
        moved = lists.buffers.get("momentum_buffer") or lists.buffers["last_grad"]
        along = inner(grads, moved)
        found = {"lr": -along}
        if "momentum" in tuned:
            own = inner(grads, lists.buffers["last_grad"])
            found["momentum"] = -lr * (along - own) / used["momentum"]
        if "weight_decay" in tuned:
            found["weight_decay"] = -lr * (inner(grads, lists.params) + lr * along)
        return {name: found[name] for name in tuned}

    def update(self, lists: Lists, values: Values, step: Value, gate: Tensor | None) -> None:
        """See `Rule.update`."""
        grads = with_decay(lists.grads, lists.params, values["weight_decay"])
        moved = grads = only_if(gate, grads)
        if buffer := lists.buffers.get("momentum_buffer"):
            scale_(buffer, gated(values["momentum"], gate, 1.0))
            torch._foreach_add_(buffer, grads)
            moved = buffer
        add_scaled_(lists.params, moved, -gated(values["lr"], gate, 0.0))
        if "last_grad" in lists.buffers:
            keep_(lists.buffers["last_grad"], grads, gate)
