"""Adam and AdamW, as `torch.optim.Adam` (L2 penalty) and `torch.optim.AdamW` (decoupled decay).

    g = grad (+ l w_ in Adam)
    m = b1 m_ + (1 - b1) g        c1 = 1 - b1^k
    v = b2 v_ + (1 - b2) g^2      c2 = 1 - b2^k
    s = sqrt(v / c2)   d = s + e  u = m / (c1 d)
    w = w_ - a u                  ((1 - a l) w_ - a u in AdamW)

With Su = < G, u >, Se = < G, u / d >, Sg = < G / d, g >, Sq = < G u / (d s), g^2 >:

    dL/da  = -Su           (-(Su + l Sw) in AdamW, Sw = < G, w_ > = (< G, w > + a Su) / (1 - a l))
    dL/de  = a Se
    dL/db1 = -a [ (c1 Su - Sg) / b1 + Su k b1^(k-1) ] / c1
    dL/db2 = a/2 [ (c2 (Su - e Se) - Sq) / b2 + (Su - e Se) k b2^(k-1) ] / c2
    dL/dl  = -a Sw         (Adam: -a < G (1 - b1) / (c1 d) - G u g (1 - b2) / (c2 d s), w_ >,
                            w_ = w + a u)

The old moments are not needed, because m_ - g = (m - g) / b1 and v_ - g^2 = (v - g^2) / b2. The
learning rate needs nothing that Adam does not hold anyway; only the betas, and l in Adam, need g to
be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

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


class Adam:
    """The rule in this file's docstring."""

    names = ("lr", "beta1", "beta2", "eps", "weight_decay")

    def __init__(self, *, decoupled: bool) -> None:
        self.decoupled = decoupled

    def buffers(self, base: Values, tuned: Collection[str]) -> tuple[str, ...]:
        """Returns both moments, and `last_grad` if a derivative needs it."""
        free = {"lr", "eps"} | ({"weight_decay"} if self.decoupled else set())
        return ("exp_avg", "exp_avg_sq", *(() if set(tuned) <= free else ("last_grad",)))

    def hypergradients(
        self, lists: Lists, used: Values, step: Value, tuned: Collection[str]
    ) -> dict[str, Tensor]:
        """See `Rule.hypergradients`."""
        if not tuned:
            return {}
        lr, decay, average = used["lr"], used["weight_decay"], lists.buffers["exp_avg"]
        c1, c2 = 1 - used["beta1"] ** step, 1 - used["beta2"] ** step
        root = list(torch._foreach_sqrt(lists.buffers["exp_avg_sq"]))
        scale_(root, c2**-0.5)
        floor = plus(root, used["eps"])
        ratio = list(torch._foreach_div(average, floor))  # c1 u
        along = inner(lists.grads, ratio) / c1
        found = {"lr": -along}
        if self.decoupled and (isinstance(decay, Tensor) or decay or "weight_decay" in tuned):
            shrunk = (inner(lists.grads, lists.params) + lr * along) / (1 - lr * decay)
            found = {"lr": -(along + decay * shrunk), "weight_decay": -lr * shrunk}
        if set(tuned) - found.keys():
            found |= self._others(lists, used, step, along, root, floor, ratio)
        return {name: found[name] for name in tuned}

    def _others(
        self,
        lists: Lists,
        used: Values,
        step: Value,
        along: Tensor,
        root: list[Tensor],
        floor: list[Tensor],
        ratio: list[Tensor],
    ) -> dict[str, Tensor]:
        """Returns dL/dh for eps, the betas and L2 decay; `along` is Su in the file's docstring."""
        lr, b1, b2, eps = used["lr"], used["beta1"], used["beta2"], used["eps"]
        c1, c2 = 1 - b1**step, 1 - b2**step
        scaled = list(torch._foreach_div(lists.grads, floor))  # G / d
        over_floor = inner(scaled, ratio) / c1  # Se
        found = {"eps": lr * over_floor}
        last = lists.buffers.get("last_grad")
        if last is None:
            return found
        curved = over_root(list(torch._foreach_mul(scaled, ratio)), last, root)  # c1 G u g / (d s)
        own, squares = inner(scaled, last), inner(curved, last) / c1  # Sg, Sq
        rooted = along - eps * over_floor
        found["beta1"] = -lr * ((c1 * along - own) / b1 + along * step * b1 ** (step - 1)) / c1
        found["beta2"] = (
            lr / 2 * ((c2 * rooted - squares) / b2 + rooted * step * b2 ** (step - 1)) / c2
        )
        if not self.decoupled:
            # < x, w_ > = < x, w > + a < x, u >
            first = inner(scaled, lists.params) + lr / c1 * inner(scaled, ratio)
            second = inner(curved, lists.params) + lr / c1 * inner(curved, ratio)
            found["weight_decay"] = -lr / c1 * ((1 - b1) * first - (1 - b2) / c2 * second)
        return found

    def update(self, lists: Lists, values: Values, step: Value, gate: Tensor | None) -> None:
        """See `Rule.update`. Torch's fused step, unless the betas, eps or decay are tensors."""
        grads = lists.grads
        if not self.decoupled and "last_grad" in lists.buffers:
            grads = with_decay(grads, lists.params, values["weight_decay"])
        if any(isinstance(values[name], Tensor) for name in self.names[1:]):
            self._update_foreach(lists, values, step, gate)
        else:
            self._update_fused(lists, values, step, gate)
        if "last_grad" in lists.buffers:
            keep_(lists.buffers["last_grad"], grads, gate)

    def _update_fused(self, lists: Lists, values: Values, step: Value, gate: Tensor | None) -> None:
        params, lr = lists.params, values["lr"]
        fused: Callable[..., None] = torch._fused_adamw_ if self.decoupled else torch._fused_adam_
        fused(
            params,
            lists.grads,
            lists.buffers["exp_avg"],
            lists.buffers["exp_avg_sq"],
            [],
            [torch.as_tensor(step, dtype=torch.float32, device=params[0].device)] * len(params),
            **{name: values[name] for name in self.names if name != "lr"},
            # The kernels read a learning rate on the device as float32.
            lr=lr.float() if isinstance(lr, Tensor) else lr,
            amsgrad=False,
            maximize=False,
            found_inf=None if gate is None else (~gate).float(),
        )

    def _update_foreach(
        self, lists: Lists, values: Values, step: Value, gate: Tensor | None
    ) -> None:
        params, grads, decay = lists.params, lists.grads, values["weight_decay"]
        average, square = lists.buffers["exp_avg"], lists.buffers["exp_avg_sq"]
        rate = gated(values["lr"], gate, 0.0)
        if self.decoupled:
            scale_(params, 1 - rate * decay)
        else:
            grads = with_decay(grads, params, decay)
        grads = only_if(gate, grads)
        b1, b2 = gated(values["beta1"], gate, 1.0), gated(values["beta2"], gate, 1.0)
        scale_(average, b1)
        add_scaled_(average, grads, 1 - b1)
        scale_(square, b2)
        add_squares_(square, grads, 1 - b2)
        c1, c2 = 1 - values["beta1"] ** step, 1 - values["beta2"] ** step
        root = list(torch._foreach_sqrt(square))
        scale_(root, c2**-0.5)
        floor = plus(root, values["eps"])
        add_scaled_(params, list(torch._foreach_div(average, floor)), -rate / c1)
