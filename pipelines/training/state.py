"""The state that training changes, and how it is saved to a checkpoint and restored bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models.encoders.blocks import use_plain_attention
from models.hyperoptim.optimizer import HyperOptimizer
from models.objectives.objective import Objective
from pipelines.config.train import PretrainConfig
from pipelines.runs.anchor import anchored
from pipelines.runs.checkpoints import (
    CheckpointError,
    CheckpointState,
    load_share,
    load_tensors,
    load_weights,
    new_objective,
    read_state,
)
from pipelines.training.collapse import CollapseWatch, MeanMeter
from pipelines.training.optimizers import averaged, build_optimizer, is_schedule_free
from pipelines.training.parallel import shard


@dataclasses.dataclass
class TrainState:
    """The state of a run at one step: weights, optimizer and meters."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    watches: dict[str, CollapseWatch]
    """Collapse watches by the name of the feature each one reads from `Output.monitored`."""
    meter: MeanMeter
    device: torch.device
    """Where the forward pass runs."""
    step: int = 0
    """Optimizer steps taken."""
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    """The newest reading of every metric."""

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Returns the tensors of a checkpoint, by group of `checkpoint_format.GROUPS`."""
        loop = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            loop["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        for name, watch in self.watches.items():
            loop |= {f"watch.{name}.{key}": t for key, t in watch.state().items()}
        loop |= {f"meter.{name}": t for name, t in self.meter.state().items()}
        return {
            "model": self._model_tensors(),
            "optimizer": optimizer_tensors(self.objective, self.optimizer),
            "loop": loop,
        }

    def _model_tensors(self) -> dict[str, Tensor]:
        """The weights to evaluate, which for Schedule-Free are averages."""
        if not is_schedule_free(self.optimizer):
            return dict(self.objective.state_dict())
        with averaged(self.optimizer):
            return {name: t.clone() for name, t in self.objective.state_dict().items()}

    def restore(
        self, folder: Path, *, rank: int, world_size: int, uri: str | None = None
    ) -> CheckpointState:
        """Restores the state from a checkpoint written by any number of processes.

        Args:
            folder: The checkpoint's folder, or a local copy of it.
            rank: Number of this process.
            world_size: Number of processes now.
            uri: The checkpoint's URI, if `folder` is a copy; errors name it.

        Raises:
            CheckpointError: The checkpoint does not load or does not fit the model.
        """
        uri = uri or str(folder)
        saved = read_state(folder, uri)
        weights = load_tensors(
            folder, "model", saved.world_size, uri, self.objective.state_dict().get
        )
        load_weights(self.objective, weights, origin=uri)
        mine = dict(self.objective.named_parameters())
        moments = load_tensors(
            *(folder, "optimizer", saved.world_size, uri),
            lambda key: mine.get(key.rpartition(":")[0]),
        )
        load_optimizer(self.objective, self.optimizer, moments)
        # With as many processes as before, each restores its own meters; otherwise the saved
        # meters are distributed and added up.
        theirs = range(rank, saved.world_size, world_size)
        shares = [load_share(folder, "loop", r, saved.world_size, uri) for r in theirs]
        self._restore_loop(shares)
        self.step, self.metrics = saved.step, saved.metrics
        for name, watch in self.watches.items():
            watch.strikes = saved.strikes.get(name, 0)
        return saved

    def _restore_loop(self, shares: list[dict[str, Tensor]]) -> None:
        for name, watch in self.watches.items():
            watch.load(_select(share, f"watch.{name}.") for share in shares)
        self.meter.load((_select(share, "meter.") for share in shares), self.device)
        if shares:
            torch.set_rng_state(shares[0]["rng.cpu"])
            if self.device.type == "cuda" and "rng.cuda" in shares[0]:
                torch.cuda.set_rng_state(shares[0]["rng.cuda"], self.device)


def _select(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def new_state(
    cfg: PretrainConfig, device: torch.device, mesh: DeviceMesh | None = None
) -> TrainState:
    """Builds the state of a run at step 0; the weights depend on `cfg.run.seed` alone.

    With a mesh, they are divided among its processes.
    """
    torch.manual_seed(cfg.run.seed)
    objective = anchored(new_objective(cfg), cfg).to(device)
    return state_of(objective, cfg, device, mesh)


def state_of(
    objective: Objective, cfg: PretrainConfig, device: torch.device, mesh: DeviceMesh | None = None
) -> TrainState:
    """Builds the state of a run at step 0 around an objective that is on its device already."""
    if device.type == "cpu" and cfg.run.precision == "bf16":
        use_plain_attention(objective)
    if mesh is not None:
        shard(objective, cfg, mesh)
    return TrainState(
        objective=objective,
        optimizer=build_optimizer(objective, cfg.optim),
        watches={
            name: CollapseWatch(cfg.watch, columns, device, of=name)
            for name, columns in objective.watched.items()
        },
        meter=MeanMeter(),
        device=device,
    )


LEVELS = ":hyper."
"""Prefix of the names of a hyperoptimizer's own tensors, which belong to no parameter."""
TRAINED = "trained"
"""Suffix of the names of the weights at which Schedule-Free takes gradients.

The weights in the model group are their average.
"""
COUNTS = ":group."
"""Prefix of the names of numbers that an optimizer keeps in its parameter groups."""


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns an optimizer's state as named tensors.

    State of a parameter is named `<parameter>:<state>`; state of no parameter has one of the
    prefixes above.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {
        f"{names[id(parameter)]}:{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    if is_schedule_free(optimizer):
        tensors |= {f"{names[id(p)]}:{TRAINED}": p.detach() for p in optimizer.state}
    if isinstance(optimizer, HyperOptimizer):
        tensors |= {LEVELS + name: t.clone() for name, t in optimizer.hyper_tensors().items()}
    for index, group in enumerate(optimizer.param_groups):
        for key in _counts(optimizer, group):
            count = torch.tensor(float(group[key]), dtype=torch.float64)
            tensors[f"{COUNTS}{index}.{key}"] = count
    return tensors


def _counts(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[str]:
    """Names of the group's values that the optimizer changes itself (schedulefree, prodigy)."""
    given = optimizer.defaults
    return [
        key
        for key, value in group.items()
        if key in given and key not in ("lr", "weight_decay") and isinstance(value, int | float)
        if value != given[key]
    ]


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Restores an optimizer from `optimizer_tensors`.

    Learning rates and weight decays are not stored, because they follow from the step.

    Raises:
        CheckpointError: There is state of a parameter that the model does not train, or state of a
            hyperoptimizer while this optimizer is none.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    index = {names[id(p)]: i for i, p in enumerate(_parameters(optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition(":")
        if not name:  # belongs to no parameter and is restored below
            continue
        if name not in index:
            raise CheckpointError(f"optimizer state of {name!r}, which this model does not train")
        state.setdefault(index[name], {})[field] = value
    _load_trained(list(_parameters(optimizer)), state)
    if _select(tensors, LEVELS) and not isinstance(optimizer, HyperOptimizer):
        raise CheckpointError("optimizer state of hyperparameters that tune themselves")
    whole = optimizer.state_dict()
    optimizer.load_state_dict({**whole, "state": state, **_levels(optimizer, tensors)})
    _load_counts(optimizer, _select(tensors, COUNTS))


def _load_trained(parameters: list[nn.Parameter], state: dict[int, dict[str, Any]]) -> None:
    """Moves the weights that Schedule-Free trains from the state into the parameters."""
    with torch.no_grad():
        for index, values in state.items():
            if (trained := values.pop(TRAINED, None)) is not None:
                parameters[index].copy_(trained)


def _levels(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    return {"hyper": _select(tensors, LEVELS)} if isinstance(optimizer, HyperOptimizer) else {}


def _load_counts(optimizer: torch.optim.Optimizer, counts: dict[str, Tensor]) -> None:
    for name, value in counts.items():
        index, _, key = name.partition(".")
        group = optimizer.param_groups[int(index)]
        group[key] = type(optimizer.defaults[key])(value.item())


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[nn.Parameter]:
    return (p for group in optimizer.param_groups for p in group["params"])
