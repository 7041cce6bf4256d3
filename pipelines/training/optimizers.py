"""Builds a run's optimizer, and reads the hyperparameters that some optimizers tune themselves.

All optimizers follow the same schedules and the same gradient clipping. Packages they need beyond
torch are in the extra `optimizers`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from models.hyperoptim.optimizer import HyperAdamW, HyperOptimizer, sum_over
from models.hyperoptim.tuner import Tuner
from models.shards import shard_group
from pipelines.config.optim import OptimConfig

Groups = list[dict[str, Any]]

PACKAGES = {"schedulefree": "schedulefree", "prodigy": "prodigyopt"}
"""Optimizers (by `optim.name`) that come from another package, and that package."""


def takes_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter decays: all but biases and one-dimensional ones, so mask tokens do."""
    return not (name.endswith("bias") or parameter.ndim == 1)


def check_installed(cfg: OptimConfig) -> None:
    """Checks that the package of `cfg.name` is installed.

    Raises:
        ValueError: It is not; the message names the flag and the command that installs it.
    """
    package = PACKAGES.get(cfg.name)
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"--optim.name {cfg.name} needs {package}: "
            'pip install -e ".[optimizers]" -c constraints.txt'
        )


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """Builds the optimizer `cfg.name` over the trainable parameters, in two groups.

    One group has weight decay, the other has none. Learning rate and decay are placeholders until
    `set_schedules` is called. The groups keep the parameters in the module's order, so that
    checkpoints of the optimizer depend on nothing but parameter names.

    Raises:
        ValueError: The package of the optimizer is not installed.
    """
    check_installed(cfg)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decay = [p for n, p in named if takes_weight_decay(n, p)]
    no_decay = [p for n, p in named if not takes_weight_decay(n, p)]
    groups: Groups = [
        {"params": decay, "decays": True},
        {"params": no_decay, "decays": False, "weight_decay": 0.0},
    ]
    return BUILDERS[cfg.name]([group for group in groups if group["params"]], cfg)


def _adamw(groups: Groups, cfg: OptimConfig) -> Optimizer:
    # Fused reads the memory once, which is faster on a CPU too (benchmarks/training/step.md).
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def _hyper_adamw(groups: Groups, cfg: OptimConfig) -> Optimizer:
    tuner = Tuner(tune=cfg.tune, lr=cfg.hyper_lr, bounds=cfg.tune_bounds, shared=True)
    shards = shard_group(p for group in groups for p in group["params"])
    return HyperAdamW(
        groups,
        lr=cfg.lr,
        betas=cfg.betas,
        eps=cfg.eps,
        tuner=tuner,
        reduce=None if shards is None else sum_over(shards),
    )


def _schedulefree(groups: Groups, cfg: OptimConfig) -> Optimizer:
    package = importlib.import_module("schedulefree")
    optimizer: Optimizer = package.AdamWScheduleFree(
        groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps
    )
    # The weights stay those at which gradients are taken; `averaged` switches to the average.
    optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _prodigy(groups: Groups, cfg: OptimConfig) -> Optimizer:
    package = importlib.import_module("prodigyopt")
    optimizer: Optimizer = package.Prodigy(
        groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, safeguard_warmup=True
    )
    return optimizer


def _muon(groups: Groups, cfg: OptimConfig) -> Optimizer:
    matrices = [{**g, "params": [p for p in g["params"] if p.ndim == 2]} for g in groups]
    rest = [{**g, "params": [p for p in g["params"] if p.ndim != 2]} for g in groups]
    # Updates are scaled to the size of AdamW's, so that one learning rate serves both.
    muon = torch.optim.Muon(
        [g for g in matrices if g["params"]], lr=cfg.lr, adjust_lr_fn="match_rms_adamw"
    )
    return Combined([muon, _adamw([g for g in rest if g["params"]], cfg)])


BUILDERS: Mapping[str, Callable[[Groups, OptimConfig], Optimizer]] = {
    "adamw": _adamw,
    "hyper-adamw": _hyper_adamw,
    "schedulefree": _schedulefree,
    "muon": _muon,
    "prodigy": _prodigy,
}
"""Optimizers by `optim.name`."""


class Combined(Optimizer):
    """Several optimizers, each with its own parameters, behind the interface of one.

    Their groups are concatenated in order, and their states are kept in one dictionary.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Takes a step with every optimizer."""
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of all optimizers at once, as `torch.optim.Optimizer` does."""
        super().load_state_dict(state_dict)
        self._share()


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether this is Schedule-Free, which evaluates other weights than it trains."""
    return type(optimizer).__name__ == "AdamWScheduleFree"


@contextlib.contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """A context in which the weights are those to be evaluated and saved.

    For Schedule-Free they are the average (x of Defazio et al. 2024, arXiv 2405.15682); for every
    other optimizer they do not change. Afterwards the trained weights are back, bit for bit.
    """
    if not is_schedule_free(optimizer):
        yield
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in weights]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(weights, trained, strict=True):
                p.copy_(value)
        # Not `train()`, which would recompute the weights, with rounding errors.
        for group in optimizer.param_groups:
            group["train_mode"] = True


def read_hyperparameters(optimizer: Optimizer) -> dict[str, float]:
    """Returns the hyperparameters that the optimizer tunes itself, as metrics; syncs the device.

    `tuned_<name>` is the value the last step used for weights that decay. `skipped_steps` counts
    the steps that were skipped because their gradient was not finite.
    """
    if isinstance(optimizer, HyperOptimizer):
        used = optimizer.hyperparameters()[0]
        tuned = {f"tuned_{name}": used[name] for name in optimizer.hyper.tuned}
        return {**tuned, "skipped_steps": float(optimizer.skipped)}
    if type(optimizer).__name__ == "Prodigy":
        group = optimizer.param_groups[0]
        return {"tuned_lr": float(group["d"] * group["lr"])}
    return {}
