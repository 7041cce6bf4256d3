"""Two gloo processes, replicated or sharded, tune like one process with the whole batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from helpers.models.hyper_cases import stack_of
from helpers.models.hyper_reference import NAMES
from models.hyperoptim.optimizer import HyperAdamW, sum_over


def _network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))


def _train(model, rank, world, **options):
    """Takes ten steps on this process's share of the batches; returns hyperparameters by step."""
    tuner = stack_of(2, NAMES["adamw"])
    optimizer = HyperAdamW(
        model.parameters(), lr=0.02, weight_decay=0.05, eps=1e-3, tuner=tuner, **options
    )
    used = []
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(8, size, generator=generator) for size in (6, 2))
        rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
        optimizer.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()
        used.append(list(optimizer.hyperparameters()[0].values()))
    return torch.tensor(used, dtype=torch.float64), optimizer


def _two_processes(rank, folder, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    replicated = nn.parallel.DistributedDataParallel(_network())
    by_ddp, _ = _train(replicated, rank, 2)

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    sharded = fully_shard(_network(), mesh=mesh)
    refused = ""
    try:
        HyperAdamW(sharded.parameters())
    except ValueError as error:
        refused = str(error)
    by_fsdp, _ = _train(sharded, rank, 2, reduce=sum_over(mesh.get_group()))
    alone, _ = _train(fully_shard(_network(), mesh=mesh), rank, 2, reduce=lambda x: None)
    weight = [p.detach().numpy() for p in replicated.module.parameters()]
    queue.put((rank, by_ddp.numpy(), by_fsdp.numpy(), alone.numpy(), weight, refused))
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one_replicated_and_sharded(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = torch.multiprocessing.spawn(
        _two_processes, args=(str(tmp_path), queue), nprocs=2, join=False
    )
    results = sorted((queue.get() for _ in range(2)), key=lambda result: result[0])
    while not processes.join():
        pass
    one, _ = _train(_network(), 0, 1)
    (_, ddp, fsdp, alone, weight, refused), (_, ddp1, fsdp1, alone1, weight1, _) = results
    assert (ddp == ddp1).all()
    assert (fsdp == fsdp1).all()
    assert all((a == b).all() for a, b in zip(weight, weight1, strict=True))
    for found in (ddp, fsdp):
        torch.testing.assert_close(torch.from_numpy(found), one, rtol=2e-4, atol=0)
    assert "sum_over" in refused
    assert not (alone == alone1).all()  # without the reduction the ranks part
