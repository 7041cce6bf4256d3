"""Everything that changes while a run trains, and its way into a checkpoint and back, bit by bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.blocks import use_plain_attention
from models.objectives import Objective, build_objective
from pipelines.checkpoints import (
    CheckpointError,
    CheckpointState,
    load_share,
    load_tensors,
    load_weights,
    read_state,
)
from pipelines.config import PretrainConfig
from pipelines.metrics import CollapseWatch, MeanMeter
from pipelines.schedules import build_optimizer


@dataclasses.dataclass
class TrainState:
    """A run at a step: weights, optimizer, meters."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    watch: CollapseWatch
    meter: MeanMeter
    step: int = 0
    """Optimizer steps taken."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """The newest reading of every metric."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.objective.parameters()).device

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Returns what a checkpoint stores, by group of `checkpoints.GROUPS`."""
        loop = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            loop["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        loop |= {f"watch.{name}": t for name, t in self.watch.state().items()}
        loop |= {f"meter.{name}": t for name, t in self.meter.state().items()}
        return {
            "model": dict(self.objective.state_dict()),
            "optimizer": optimizer_tensors(self.objective, self.optimizer),
            "loop": loop,
        }

    def restore(self, folder: Path, *, rank: int, world_size: int) -> CheckpointState:
        """Continues from a checkpoint written by any number of processes.

        Raises:
            CheckpointError: it does not load or does not fit.
        """
        saved = read_state(folder)
        load_weights(
            self.objective, load_tensors(folder, "model", saved.world_size), origin=str(folder)
        )
        load_optimizer(
            self.objective, self.optimizer, load_tensors(folder, "optimizer", saved.world_size)
        )
        # With as many processes as before each gets its own back; otherwise they are folded.
        mine = range(rank, saved.world_size, world_size)
        shares = [load_share(folder, "loop", r, saved.world_size) for r in mine]
        self._restore_loop(shares)
        self.step, self.metrics, self.watch.strikes = saved.step, saved.metrics, saved.strikes
        return saved

    def _restore_loop(self, shares: list[dict[str, Tensor]]) -> None:
        self.watch.load(_select(share, "watch.") for share in shares)
        self.meter.load((_select(share, "meter.") for share in shares), self.device)
        if shares:
            torch.set_rng_state(shares[0]["rng.cpu"])
            if self.device.type == "cuda" and "rng.cuda" in shares[0]:
                torch.cuda.set_rng_state(shares[0]["rng.cuda"], self.device)


def _select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def new_state(cfg: PretrainConfig, device: torch.device) -> TrainState:
    """A run at step 0; its weights follow from `cfg.run.seed` alone."""
    torch.manual_seed(cfg.run.seed)
    objective = build_objective(
        cfg.objective.name,
        model=cfg.model_settings,
        objective=cfg.objective_settings,
    ).to(device)
    if device.type == "cpu" and cfg.run.precision == "bf16":
        use_plain_attention(objective)
    width = objective.feature_encoder.width
    assert isinstance(width, int)
    return TrainState(
        objective=objective,
        optimizer=build_optimizer(objective, cfg.optim),
        watch=CollapseWatch(cfg.watch, width, device),
        meter=MeanMeter(),
    )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Names an optimizer's per-parameter state: `<parameter>:<state>` to tensor."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(parameter)]}:{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Puts `optimizer_tensors` back; learning rates and decays follow from the step.

    Raises:
        CheckpointError: state of a parameter that the model does not train.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    index = {names[id(p)]: i for i, p in enumerate(_parameters(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition(":")
        if name not in index:
            raise CheckpointError(f"optimizer state of {name!r}, which this model does not train")
        state.setdefault(index[name], {})[field] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])
