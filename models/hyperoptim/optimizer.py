"""Optimizers that descend their own hyperparameters, used like those of `torch.optim`.

The method is that of Chandra et al., 2022, *Gradient Descent: The Ultimate Optimizer*, arXiv
1909.13371. There autograd differentiates through the update; here the derivative has a closed form
(sgd.py, rmsprop.py, adam.py) of what the optimizer holds anyway. The order is the paper's: the top
of the stack moves first, each level uses the hyperparameters it was just given, and the weights
move last.
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
    """Returns the `reduce` for sharded weights, which sums a small tensor over the shards in place.

    Args:
        group: processes that hold shards of one copy of the model, `mesh.get_group()`; with HSDP,
            of the shard dimension only.
    """

    def reduce(values: Tensor) -> None:
        dist.all_reduce(values, group=group)

    return reduce


class HyperOptimizer(torch.optim.Optimizer):
    """Base of the four optimizers.

    With a tuner, a step whose gradient is not finite is skipped: weights, moments and
    hyperparameters stay. `skipped` counts such steps, on the device. Without a tuner nothing is
    checked.

    Args:
        params: parameters or groups, all of one dtype on one device. A parameter that has a
            gradient at the first step must have one at every step.
        defaults: hyperparameters of groups that do not give their own.
        tuner: what is tuned, and how; None gives torch's optimizer.
        reduce: sums a tensor over the shards of the parameters, in place (`sum_over`). Not needed
            under DDP, where gradients are equal on all processes.
        capturable: never wait for the device. None means yes on CUDA, and no on a CPU, where
            reading costs nothing.

    Raises:
        ValueError: a hyperparameter is unknown or out of range, parameters differ in dtype or
            device, or they are sharded and there is no `reduce`.
    """

    rule: ClassVar[Rule]
    tuning: bool
    """Whether hyperparameters move; set to False during warm-up or at the end of a schedule."""

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
        """Number of steps taken, without skipped ones."""
        self.skipped = torch.zeros_like(self.steps)
        """Number of steps skipped because the gradient was not finite."""

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
        """Adds a group; for the constructor only.

        Raises:
            RuntimeError: called after the constructor.
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
        """Returns the tensors of every group; for sharded parameters, this process's shards."""
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
        """Returns the derivatives of the loss by theta [R, H]; not finite if a gradient is not."""
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
            # Before the first step there is no update to differentiate.
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
        """Returns the values that the last step used, by group. Waits for the device."""
        rows = self.hyper.used_GA.tolist()
        return [dict(zip(self.rule.names, row, strict=True)) for row in rows]

    def hyper_tensors(self) -> dict[str, Tensor]:
        """Returns what a checkpoint stores besides the parameters' buffers: levels and counts."""
        levels = self.level.tensors() if self.level else {}
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            **self.hyper.tensors(),
            **{f"level.{name}": tensor for name, tensor in levels.items()},
        }

    def load_hyper_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads what `hyper_tensors` has returned.

        Raises:
            ValueError: they belong to a stack of other levels.
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
        """Returns torch's state, and all levels under `hyper`."""
        return {**super().state_dict(), "hyper": self.hyper_tensors()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads torch's state and all levels."""
        given = dict(state_dict)
        self.load_hyper_tensors(given.pop("hyper"))
        super().load_state_dict(given)
        for state in self.state.values():
            # Sums may depend on how memory is aligned. A copy is aligned as before; the pages of a
            # checkpoint's file need not be.
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
    """Returns a group's given hyperparameters under the rule's names."""
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
    """Returns this process's shard of a sharded tensor, and any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
