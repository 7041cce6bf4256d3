"""Optimizers that descend their own hyperparameters: `step()` of `torch.optim`, and nothing else.

Chandra et al., 2022, *Gradient Descent: The Ultimate Optimizer*, arXiv 1909.13371. There autograd
differentiates through the update; here the derivative has a closed form (sgd.py, rmsprop.py, adam.py)
that reads what the optimizer holds anyway. The order is the paper's: the top of the stack moves
first, each level then uses what it was just given, and the weights move last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.hyperoptim.rules import Rule
from models.hyperoptim.tensor_lists import Lists, at_least_1, number
from models.hyperoptim.tuner import DEFAULT, RULES, Level, Tuner, hyperparameters, under

Params = Iterable[Tensor] | Iterable[dict[str, Any]]
Reduce = Callable[[Tensor], None]


def sum_over(group: dist.ProcessGroup) -> Reduce:
    """The `reduce` of sharded weights: sums a tensor of a few numbers over the shards, in place.

    Args:
        group: Processes that hold shards of one copy of the model (of HSDP the shard dimension only):
            `mesh.get_group()`.
    """

    def reduce(values: Tensor) -> None:
        dist.all_reduce(values, group=group)

    return reduce


class HyperOptimizer(torch.optim.Optimizer):
    """What the four optimizers share.

    A step whose gradient is not finite is skipped whole: weights, moments, hyperparameters. `skipped`
    counts them, on the device. (Without a tuner nothing is checked.)

    Args:
        params: Parameters or groups, all of one dtype on one device. Every parameter that has a
            gradient at the first step must have one at every step.
        defaults: Hyperparameters of groups that do not say.
        tuner: What is tuned, and how; None makes it torch's optimizer.
        reduce: Sums a tensor over the shards of the parameters, in place (`sum_over`). Under DDP
            leave it out: the gradients are equal on all processes, and so is what follows from them.
        capturable: Never wait for the device. None: on CUDA yes; on a CPU, where reading is free, no.

    Raises:
        ValueError: a hyperparameter out of range or unknown, parameters of several kinds, or sharded
            parameters without `reduce`.
    """

    rule: ClassVar[Rule]
    tuning: bool
    """Whether hyperparameters move; set it false for the warm-up or the end of a schedule."""

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        tuner: Tuner | None,
        reduce: Reduce | None,
        capturable: bool | None,
    ) -> None:
        super().__init__(params, defaults)
        first = self._check_parameters(reduce)
        on_host = first.device.type == "cpu" if capturable is None else not capturable
        self.tuning, self._reduce = True, reduce
        bases = [_base(group, self.rule.names) for group in self.param_groups]
        self.hyper = hyperparameters(
            self.rule.names, bases, tuner, on_host=on_host, device=first.device
        )
        self.level = Level(tuner, self.hyper) if tuner else None
        self._buffers = [self.rule.buffers(base, self.hyper.tuned) for base in bases]
        self.steps = torch.zeros((), dtype=torch.float32, device=first.device)
        """Steps taken, without the skipped."""
        self.skipped = torch.zeros_like(self.steps)
        """Steps skipped because the gradient was not finite."""

    def _check_parameters(self, reduce: Reduce | None) -> Tensor:
        params = [p for group in self.param_groups for p in group["params"]]
        if len({(p.dtype, p.device) for p in params}) != 1:
            raise ValueError("params: all of one dtype on one device, or one optimizer each")
        sharded = any(isinstance(p, DTensor) and _is_sharded(p) for p in params)
        if sharded and reduce is None:
            raise ValueError("params are sharded: give reduce=sum_over(mesh.get_group())")
        first: Tensor = params[0]
        return first

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; only the constructor may.

        Raises:
            RuntimeError: called later.
        """
        if hasattr(self, "hyper"):
            raise RuntimeError("all groups must be given when the optimizer is made")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves the hyperparameters, then the weights; skips both if the gradient is not finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self._gather()
        by_theta_RH = self._hypergradients(groups)
        finite = torch.isfinite(by_theta_RH).all()
        if not self.hyper.on_host:
            self._move(groups, torch.where(finite, by_theta_RH, 0.0), finite)
            self.skipped += ~finite
        elif finite:
            self._move(groups, by_theta_RH, None)
        else:
            self.skipped += 1
        return loss

    def _gather(self) -> list[Lists]:
        """The tensors of every group; of sharded parameters, what is here."""
        first = not self.state
        return [
            self._lists(group["params"], names, first)
            for group, names in zip(self.param_groups, self._buffers, strict=True)
        ]

    def _lists(self, params: list[Tensor], names: tuple[str, ...], first: bool) -> Lists:
        for param in params:
            if first and param.grad is not None:
                self.state[param] = {name: torch.zeros_like(param) for name in names}
            elif not first and (param in self.state) != (param.grad is not None):
                raise RuntimeError("a parameter must have a gradient at every step or at none")
        params = [p for p in params if p.grad is not None and _local(p).numel()]
        buffers = {name: [_local(self.state[p][name]) for p in params] for name in names}
        grads = [_local(p.grad) for p in params if p.grad is not None]
        return Lists([_local(p) for p in params], grads, buffers)

    def _hypergradients(self, groups: list[Lists]) -> Tensor:
        """Derivatives of the loss by theta [R, H], over all shards; NaN if a gradient is not finite."""
        tuned, used = self.hyper.tuned, self.hyper.used()
        step = at_least_1(number(self.steps, self.hyper.on_host))
        by_value_GH = torch.zeros(
            len(groups), len(tuned), dtype=torch.float64, device=self.steps.device
        )
        if not tuned:
            return by_value_GH
        for row, lists in enumerate(groups):
            for part in lists.chunks():
                found = self.rule.hypergradients(part, used[row], step, tuned)
                by_value_GH[row] += torch.stack([found[name] for name in tuned])
        if self._reduce is not None:
            self._reduce(by_value_GH)
        return self.hyper.by_theta(by_value_GH)

    def _move(self, groups: list[Lists], by_theta_RH: Tensor, gate: Tensor | None) -> None:
        if self.level is not None and self.tuning:
            # Before the first step there was no update to differentiate.
            if gate is not None:
                self.level.step(by_theta_RH, gate & (self.steps > 0))
            elif self.steps:
                self.level.step(by_theta_RH, None)
        values = self.hyper.values([_base(g, self.rule.names) for g in self.param_groups])
        self.steps += 1 if gate is None else gate
        step = at_least_1(number(self.steps, self.hyper.on_host))
        for lists, of_group in zip(groups, values, strict=True):
            for part in lists.chunks():
                self.rule.update(part, of_group, step, gate)
        self.hyper.remember(values, gate)

    def hyperparameters(self) -> list[dict[str, float]]:
        """The values that the last step used, by group. Waits for the device."""
        rows = self.hyper.used_GA.tolist()
        return [dict(zip(self.rule.names, row, strict=True)) for row in rows]

    def hyper_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides every parameter's buffers: all levels, and the counts."""
        levels = self.level.tensors() if self.level else {}
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            **self.hyper.tensors(),
            **{f"level.{name}": tensor for name, tensor in levels.items()},
        }

    def load_hyper_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes `hyper_tensors` back.

        Raises:
            ValueError: those of another stack.
        """
        mine = self.hyper_tensors()
        if wrong := sorted(mine.keys() ^ tensors.keys()):
            raise ValueError(f"hyperparameters of another stack: {wrong} differ")
        self.steps.copy_(tensors["steps"])
        self.skipped.copy_(tensors["skipped"])
        self.hyper.load(tensors)
        if self.level is not None:
            self.level.load(under("level.", tensors))

    def state_dict(self) -> dict[str, Any]:
        """Torch's, and `hyper`: every level."""
        return {**super().state_dict(), "hyper": self.hyper_tensors()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's, and every level."""
        given = dict(state_dict)
        self.load_hyper_tensors(given.pop("hyper"))
        super().load_state_dict(given)
        for state in self.state.values():
            # Sums may depend on how memory is aligned: a copy of one's own is as before, where the
            # pages of a checkpoint's file need not be.
            state.update({name: tensor.clone() for name, tensor in state.items()})


class HyperSGD(HyperOptimizer):
    """`torch.optim.SGD` (no dampening, no Nesterov) that can tune lr, momentum, weight_decay."""

    rule = RULES["sgd"]

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        tuner: Tuner | None = DEFAULT,
        reduce: Reduce | None = None,
        capturable: bool | None = None,
    ) -> None:
        _check(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "weight_decay": weight_decay},
            tuner=tuner,
            reduce=reduce,
            capturable=capturable,
        )


class HyperRMSprop(HyperOptimizer):
    """`torch.optim.RMSprop` that can tune lr, alpha, eps, weight_decay, momentum."""

    rule = RULES["rmsprop"]

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        *,
        tuner: Tuner | None = DEFAULT,
        reduce: Reduce | None = None,
        capturable: bool | None = None,
    ) -> None:
        _check(lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
        super().__init__(
            params,
            {
                "lr": lr,
                "alpha": alpha,
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum": momentum,
            },
            tuner=tuner,
            reduce=reduce,
            capturable=capturable,
        )


class HyperAdam(HyperOptimizer):
    """`torch.optim.Adam` that can tune lr, beta1, beta2, eps, weight_decay (an L2 penalty)."""

    rule = RULES["adam"]

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        tuner: Tuner | None = DEFAULT,
        reduce: Reduce | None = None,
        capturable: bool | None = None,
    ) -> None:
        _check(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            tuner=tuner,
            reduce=reduce,
            capturable=capturable,
        )


class HyperAdamW(HyperAdam):
    """`torch.optim.AdamW` that can tune lr, beta1, beta2, eps, weight_decay (decoupled).

    Weight decay is 0 unless given.
    """

    rule = RULES["adamw"]


def _base(group: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """A group's given hyperparameters under the rule's names."""
    given = dict(group)
    if "betas" in given:
        given["beta1"], given["beta2"] = given["betas"]
    return {name: float(given[name]) for name in names}


def _check(**given: float) -> None:
    for name, value in given.items():
        high = 1.0 if name in ("beta1", "beta2", "momentum", "alpha") else float("inf")
        if not (value > 0 if name == "eps" else 0 <= value < high):
            raise ValueError(f"{name}: out of range: {value}")


def _is_sharded(tensor: DTensor) -> bool:
    return any(not placement.is_replicate() for placement in tensor.placements)


def _local(tensor: Tensor) -> Tensor:
    """What of a sharded tensor is on this process; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
