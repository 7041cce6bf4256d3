"""Counts the memory of one training step of a recipe on one of W GPUs, without any GPU.

    PYTHONPATH=. python benchmarks/training/sharded_memory.py ijepa_vitg16_in22k \\
        --workers 8 --rows 32 64 --checkpointing off

Tensors are fake (they have a shape and no data), and so are the processes: what is counted is every
allocation of rank 0 in the forward and backward pass of the second step, which has the optimizer's
state. A GPU needs more: the allocator's gaps, NCCL's and cuBLAS's buffers, and the CUDA context,
together a few GB. The model is built whole before it is divided, which takes its weights once.

Prints a row of Markdown for each number of rows (images or clips) in a micro-batch of a worker.
"""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from models.objectives.objective import Objective
from models.shards import local
from pipelines.capacity.step_cost import empty_objective, make_batch
from pipelines.config.train import PretrainConfig
from pipelines.recipes.registry import RECIPES
from pipelines.training.contract import Worker
from pipelines.training.optimizers import build_optimizer
from pipelines.training.parallel import shard, shard_mesh

GIB = 2**30
KIND = "cpu"  # autograd does not run on fake CUDA tensors


def bytes_of(tensors: Iterable[Tensor]) -> float:
    """Memory of this process's rows of tensors, GiB."""
    return sum(local(tensor).nbytes for tensor in tensors) / GIB


def backward(cfg: PretrainConfig, objective: Objective, batch: dict[str, Tensor]) -> None:
    """Goes forward and backward, as the trainer does."""
    with torch.autocast(KIND, torch.bfloat16, enabled=cfg.run.precision == "bf16"):
        loss = objective(batch).loss
    loss.backward()  # type: ignore[no-untyped-call]


def measure(cfg: PretrainConfig, batch: dict[str, Tensor]) -> dict[str, float]:
    """Returns GiB of weights, gradients, optimizer state, and the most that is held at a time."""
    mesh = shard_mesh(cfg, Worker(0, cfg.run.workers, cfg.run.workers, torch.device(KIND)))
    assert mesh is not None
    empty = empty_objective(cfg)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        objective = empty.to_empty(device=KIND)
        shard(objective, cfg, mesh)
        optimizer = build_optimizer(objective, cfg.optim)
        fake = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
        weights = list(objective.parameters())
        for _ in range(2):
            # The tracker also leaves out the collectives, which want data.
            tracker = FSDPMemTracker(objective, optimizer)
            tracker.track_inputs((fake,))
            with tracker:
                backward(cfg, objective, fake)
            # Not counted: DTensor plans the step with whole tensors that are fake on a GPU too. The
            # fused step and the EMA work in place.
            optimizer.step()
            optimizer.zero_grad()
    moments = [t for state in optimizer.state.values() for t in state.values()]
    return {
        "weights": bytes_of(weights),
        "gradients": bytes_of(w for w in weights if w.requires_grad),
        "optimizer": bytes_of(moments),
        "all": tracker.get_tracker_snapshot("peak")[torch.device(KIND)]["Total"] / GIB,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[32])
    parser.add_argument("--checkpointing", choices=["on", "off"], default="off")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    dist.init_process_group("fake", rank=0, world_size=args.workers, store=FakeStore())
    (_, cfg), count = RECIPES[args.recipe], args.workers
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, lanes=count, batch_size=count * max(args.rows)),
        run=dataclasses.replace(cfg.run, workers=count, parallel="fsdp", accumulate=1),
        model=dataclasses.replace(cfg.model, activation_checkpointing=args.checkpointing == "on"),
    )
    for rows in args.rows:
        found = measure(cfg, make_batch(cfg, rows))
        numbers = " | ".join(f"{value:.1f}" for value in found.values())
        print(
            f"| {args.recipe} | {count} | {rows} | {args.checkpointing} | {numbers} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
