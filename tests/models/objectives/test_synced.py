"""W gloo processes that share a batch compute the loss and the gradients of a single process.

`python tests/models/objectives/test_synced.py W` makes one measurement. The test runs it with
W = 1, 2 and 4.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.own_ray import python_path
from helpers.repository import ROOT

BATCH = 16
TOLERANCES = {"fp64": 1e-12, "lejepa": 1e-4, "vicreg": 1e-4, "ijepa": 1e-4}
"""Relative tolerances of loss and gradients; `ijepa` is regularized by SIGReg of its context."""


def statistics_in_fp64() -> Any:
    """Every statistic that is exchanged between processes, as a function of some weights."""
    import torch
    from torch import nn

    from models.objectives.objective import Output
    from models.objectives.sigreg import SIGReg
    from models.objectives.vicreg import variance_and_covariance
    from models.synced import SyncedBatchNorm

    class Statistics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(12, 9), SyncedBatchNorm(9), nn.Tanh(), nn.Linear(9, 7)
            )
            self.sigreg = SIGReg(slices=20)

        def forward(self, batch: dict[str, Any]) -> Any:
            rows = self.layers(batch["images"][:, 0, 0, :12].double() / 255)
            variance, covariance = variance_and_covariance(rows)
            return Output(self.sigreg(rows) + 3 * variance + covariance)

    torch.manual_seed(0)
    return Statistics().double()


def objective_of(name: str) -> Any:
    import torch

    from models.objectives.registry import build_objective
    from pipelines.config.objectives import ObjectiveConfig
    from pipelines.config.train import ModelConfig, PretrainConfig
    from pipelines.config.views import ViewsConfig

    if name == "fp64":
        return statistics_in_fp64()
    cfg = PretrainConfig(
        model=ModelConfig(encoder="vit_micro32", image_size=32, patch_size=16, patch_std=0.14),
        objective=ObjectiveConfig(
            name=name,
            projector=(24, 12),
            slices=16,
            regularize="context_pooled" if name == "ijepa" else None,
            regularizer_weight=0.5,
        ),
        views=ViewsConfig(blur=0.5),
    )
    torch.manual_seed(0)
    return build_objective(name, model=cfg.model_settings, objective=cfg.objective_settings)


def batch_of() -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(1)
    order = torch.rand(BATCH, 4, generator=generator).argsort(1)
    return {
        "images": torch.randint(0, 256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "sample_keys": torch.arange(BATCH) * 991,
        "context_ids": order[:, :2].sort(1).values,
        "target_ids": order[:, None, 2:].sort(2).values,
    }


def measure(rank: int, world: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world
        )
    found = {}
    for name in TOLERANCES:
        objective = objective_of(name)
        model = torch.nn.parallel.DistributedDataParallel(objective) if world > 1 else objective
        size = BATCH // world
        local = {k: v[rank * size : (rank + 1) * size] for k, v in batch_of().items()}
        output = model(local)
        output.loss.backward()
        loss = output.loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        grads = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
        found[name] = {"loss": float(loss) / world, "grad": torch.cat(grads).tolist()}
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(found))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(folder: str) -> None:
    """Imports torch once and then forks the processes, in a process without pytest's threads."""
    import torch.multiprocessing

    import models.objectives.registry  # noqa: F401  # before the forks, as all the rest

    for world in (1, 2, 4):
        torch.multiprocessing.start_processes(measure, (world, folder), world, start_method="fork")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("worlds")
    env = {
        **os.environ,
        "PYTHONPATH": python_path(ROOT, ROOT / "tests"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return {world: json.loads((folder / f"{world}.json").read_text()) for world in (1, 2, 4)}


@pytest.mark.parametrize("name", list(TOLERANCES))
@pytest.mark.parametrize("world", [2, 4])
def test_workers_change_neither_loss_nor_gradient(measured: Any, world: int, name: str) -> None:
    one, many = measured[1][name], measured[world][name]
    assert many["loss"] == pytest.approx(one["loss"], rel=TOLERANCES[name])
    scale = max(map(abs, one["grad"]))
    assert scale > 1e-4
    worst = max(abs(a - b) for a, b in zip(one["grad"], many["grad"], strict=True))
    assert worst < TOLERANCES[name] * scale


def test_without_the_exchange_the_loss_differs() -> None:
    """A negative control: each half of the batch by itself has another loss."""
    import torch

    objective, batch = objective_of("lejepa"), batch_of()
    whole = objective(batch).loss
    halves = [{k: v[part] for k, v in batch.items()} for part in (slice(8), slice(8, 16))]
    apart = torch.stack([objective(half).loss for half in halves]).mean()
    assert abs(apart / whole - 1) > 1e-2


if __name__ == "__main__":
    main(sys.argv[1])
